"""Raw rows to clean ones: every one is kept, dropped with a reason or unreadable, and all are counted."""

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from embedlib.hashing import Words
from embedlib.reading import RAW, RawRow
from embedlib.refining import KEPT, RefineConfig, Refined, evaluation_hashes, refine

NOTHING = np.empty(0, np.uint64)
EN, DE = "The train leaves at seven in the morning.", "Der Zug fährt um sieben Uhr am Morgen ab."
OTHER = "She planted tomatoes behind the garage."


def run(rows: list[RawRow], evaluation: Words = NOTHING, **values: object) -> Refined:
    table = pa.Table.from_pylist([row._asdict() for row in rows], RAW)
    return refine(table, RefineConfig.model_validate(values), 4, evaluation)


def test_texts_translations_and_what_ties_them() -> None:
    found = run([RawRow(EN, "en", DE, "de"), RawRow(OTHER, "en-GB"), RawRow(DE, None, group="7")])
    rows = found.rows.to_pylist()
    assert [(row["text"], row["lang"]) for row in rows] == [(EN, "en"), (DE, "de"), (OTHER, "en"), (DE, "de")]
    assert rows[0]["group"] == rows[1]["group"] == rows[0]["high"]
    assert rows[2]["group"] is None
    assert rows[3]["group"] not in (None, rows[0]["group"])
    assert {row["source"] for row in rows} == {4}
    assert found.added == 1
    assert found.tally == {("en", KEPT): 2, ("de", KEPT): 2}


def test_pairs_stay_or_go_together() -> None:
    rows = [
        RawRow(EN, "en", DE, "de"),
        RawRow(EN, "en"),
        RawRow(EN, "en", "kurz", "de"),
        RawRow(EN, "en", EN.upper(), "de"),
        RawRow("", "en", DE, "de"),
    ]
    found = run(rows, product="pairs")
    assert found.rows.select(["text", "lang", "right", "right_lang"]).to_pylist() == [
        {"text": EN, "lang": "en", "right": DE, "right_lang": "de"}
    ]
    reasons = {reason: count for (_, reason), count in found.tally.items()}
    assert reasons == {KEPT: 1, "no translation": 1, "too short": 1, "untranslated": 1, "empty": 1}
    assert found.samples["too short"] == [f"{EN} ‖ kurz"]
    assert found.added == 0


def test_evaluation_texts_are_found_in_other_clothes() -> None:
    evaluation = evaluation_hashes([EN, DE])
    found = run([RawRow(EN.upper() + "!", "en"), RawRow(OTHER, "en", DE, "de")], evaluation)
    assert found.tally == {("en", "in evaluation data"): 1, ("de", "in evaluation data"): 1, ("en", KEPT): 1}


def test_evaluation_texts_are_found_before_they_are_masked_or_cut() -> None:
    called, two = "Please call me at +49 30 1234567 tomorrow morning.", f"{EN} {OTHER}"
    masked = run([RawRow(called, "en")], evaluation_hashes([called]), mask_personal=True)
    assert masked.tally == {("en", "in evaluation data"): 1}
    cut = run([RawRow(two, "en")], evaluation_hashes([two], split=True), split_sentences=True)
    assert cut.tally == {("en", "in evaluation data"): 2}


def test_languages_may_be_asked_for_with_their_region() -> None:
    assert RefineConfig(languages=["pt_BR", "zh-CN", "nb"]).languages == ["pt", "zh", "no"]


def test_languages_are_identified_as_asked() -> None:
    rows = [RawRow(EN, None), RawRow(DE, "en"), RawRow(OTHER, "xx")]
    langs = {
        how: sorted(run(rows, identify=how, quality={"check_script": False}).tally.items())
        for how in ("missing", "check", "always", "never")
    }
    assert langs["missing"] == [(("en", KEPT), 2), (("xx", KEPT), 1)]
    assert langs["check"] == [(("en", KEPT), 1), (("en", "another language"), 1), (("xx", "another language"), 1)]
    assert langs["always"] == [(("de", KEPT), 1), (("en", KEPT), 2)]
    assert langs["never"] == [(("en", KEPT), 1), (("und", KEPT), 1), (("xx", KEPT), 1)]
    wanted = run([RawRow(EN, "en"), RawRow(DE, "de")], languages=["de"])
    assert wanted.tally == {("de", KEPT): 1, ("en", "language not asked for"): 1}


def test_texts_are_cut_into_sentences_and_pairs_are_not() -> None:
    found = run([RawRow(f"{EN} {OTHER}", "en"), RawRow(f"{EN} {OTHER}", "en", DE, "de")], split_sentences=True)
    assert found.rows["text"].to_pylist() == [EN, OTHER, f"{EN} {OTHER}", DE]
    assert found.added == 2


def test_a_loose_key_makes_like_texts_equal() -> None:
    rows = [RawRow(EN, "en"), RawRow(EN.upper(), "en")]
    assert len(set(run(rows).rows["high"].to_pylist())) == 2
    assert len(set(run(rows, key="loose").rows["high"].to_pylist())) == 1


def test_personal_data_is_masked_before_texts_are_compared() -> None:
    rows = [RawRow(f"Write to {name}@example.org about the train.", "en") for name in ("ann", "bob")]
    found = run(rows, mask_personal=True).rows
    assert set(found["text"].to_pylist()) == {"Write to <email> about the train."}
    assert len(set(found["high"].to_pylist())) == 1


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.one_of(st.none(), st.text(max_size=40), st.just(EN), st.just(DE)),
            st.sampled_from(["en", "de", "und", "zh-Hans", "", None]),
            st.one_of(st.none(), st.text(max_size=40), st.just(DE)),
            st.one_of(st.none(), st.just("broken")),
        ),
        max_size=20,
    ),
    st.sampled_from(["corpus", "pairs", "query_passage"]),
    st.booleans(),
)
def test_nothing_is_lost(
    rows: list[tuple[str | None, str | None, str | None, str | None]], product: str, split: bool
) -> None:
    raw = [RawRow(text or "", lang, right, "de", reason=reason) for text, lang, right, reason in rows]
    found = run(raw, evaluation_hashes([EN]), product=product, split_sentences=split)
    assert found.tally.total() + len(found.unreadable) == len(rows) + found.added
    assert sum(count for (_, reason), count in found.tally.items() if reason == KEPT) == len(found.rows)
    assert [each.row for each in found.unreadable] == [number for number, row in enumerate(raw) if row.reason]
    assert found.rows["text"].null_count == 0


def test_batches_are_one_after_the_other() -> None:
    raw = [RawRow(f"{OTHER} {number}", "en", reason="bad" if number % 5000 == 1 else None) for number in range(20_000)]
    found = run(raw)
    assert [each.row for each in found.unreadable] == [1, 5001, 10001, 15001]
    expected = [row.text for row in raw if not row.reason]
    assert found.rows["text"].to_pylist() == expected
