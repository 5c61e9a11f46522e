import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedlib.corpus import CorpusConfig, choose_texts, corpus_files, read_rows, split_corpus, texts_by_language
from embedlib.errors import DataError
from embedlib.schemas import CORPUS, QUARANTINE

SPLITS = ("train", "validation", "held_out")
PLAIN = [f"sentence number {number}" for number in range(60)]


def config(path: Path, **values: Any) -> CorpusConfig:
    return CorpusConfig.model_validate(
        {"path": str(path), "validation_share": 0.2, "held_out_share": 0.2, "max_characters": 1000} | values
    )


def write_lines(path: Path, *lines: bytes | dict[str, Any]) -> Path:
    encoded = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"".join(line + b"\n" for line in [*encoded, *(json.dumps({"text": t}).encode() for t in PLAIN)]))
    return path


def write_parquet(path: Path, texts: pa.Array, **columns: Any) -> Path:
    pq.write_table(pa.table({"text": texts, **columns}), path)
    return path


def split(path: Path, tmp_path: Path, **values: Any) -> tuple[dict[str, Any], dict[str, pa.Table]]:
    output = tmp_path / "split"
    output.mkdir(exist_ok=True)
    counts = split_corpus(config(path, **values), output)
    return counts, {name: pq.read_table(output / f"{name}.parquet") for name in (*SPLITS, "quarantine")}


def all_texts(tables: dict[str, pa.Table]) -> list[str]:
    return [text for name in SPLITS for text in tables[name]["text"].to_pylist()]


BAD_LINES: list[tuple[bytes | dict[str, Any], str, str]] = [
    ({"text": None}, "null", ""),
    ({"text": ""}, "empty", ""),
    ({"text": " \t\n"}, "empty", ""),
    ({"text": "x" * 1_000_000}, "too long", "x" * 200),
    (b'{"text": "caf\xe9"}', "invalid UTF-8", '{"text": "caf\ufffd"}'),
    ({"text": "\ud800 half a pair"}, "invalid UTF-8", "\ufffd\ufffd\ufffd half a pair"),
    (b"just words", "not JSON", "just words"),
    (b"", "not JSON", ""),
    ({"body": "elsewhere"}, "no 'text'", "{'body': 'elsewhere'}"),
    (b"[1, 2]", "no 'text'", "[1, 2]"),
    ({"text": 5}, "'text' is int", "5"),
    ({"text": ["a"]}, "'text' is list", "['a']"),
]


def test_bad_json_lines_are_quarantined_with_their_reason(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "corpus.jsonl", *(line for line, *_ in BAD_LINES))
    counts, tables = split(path, tmp_path)
    assert tables["quarantine"].schema.equals(QUARANTINE)
    rows = tables["quarantine"].to_pylist()
    assert [row["row"] for row in rows] == list(range(len(BAD_LINES)))
    assert {row["source"] for row in rows} == {str(path)}
    found = [(row["reason"], row["excerpt"].rstrip("\n")) for row in rows]
    assert found == [(reason, excerpt) for _, reason, excerpt in BAD_LINES]
    assert counts["quarantined"] == Counter(reason for _, reason, _ in BAD_LINES)
    assert sorted(all_texts(tables)) == sorted(PLAIN)


def test_a_very_long_line_that_is_not_json_leaves_an_excerpt(tmp_path: Path) -> None:
    _, tables = split(write_lines(tmp_path / "corpus.jsonl", b"\xff" * 1_000_000), tmp_path)
    assert [len(excerpt) for excerpt in tables["quarantine"]["excerpt"].to_pylist()] == [200]


def invalid_utf8(texts: list[bytes | None]) -> pa.Array:
    binary = pa.array(texts, pa.binary())
    return pa.StringArray.from_buffers(len(texts), *binary.buffers()[1:], binary.buffers()[0])


def test_bad_parquet_rows_are_quarantined_with_their_reason(tmp_path: Path) -> None:
    texts = [None, b"", b"  ", b"\xff\xfe broken", b"y" * 1_000_000, *(text.encode() for text in PLAIN)]
    path = write_parquet(tmp_path / "corpus.parquet", invalid_utf8(texts))
    counts, tables = split(path, tmp_path)
    rows = [(row["row"], row["reason"], row["excerpt"]) for row in tables["quarantine"].to_pylist()]
    assert rows == [
        (0, "null", ""),
        (1, "empty", ""),
        (2, "empty", ""),
        (3, "invalid UTF-8", "\ufffd\ufffd broken"),
        (4, "too long", "y" * 200),
    ]
    assert sorted(all_texts(tables)) == sorted(PLAIN)
    assert counts["sentences_by_language"] == {"und": len(PLAIN)}


def test_the_schema_is_kept_and_ids_are_dense(tmp_path: Path, tiny_corpus: Path) -> None:
    counts, tables = split(tiny_corpus, tmp_path)
    for name in SPLITS:
        assert tables[name].schema.equals(CORPUS)
        assert tables[name]["id"].to_pylist() == list(range(counts["splits"][name]))
    assert sum(counts["splits"].values()) == 336
    assert counts["sentences_by_language"]["th"] == 24
    assert counts["quarantined"] == {}
    assert tables["quarantine"].num_rows == 0


def test_texts_are_composed_and_trimmed(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "corpus.jsonl", {"text": "  Cafe\u0301\n"})
    assert "Caf\u00e9" in all_texts(split(path, tmp_path)[1])


def test_large_strings_and_dictionary_languages_are_read(tmp_path: Path) -> None:
    langs = pa.array(["en", "de", None] * 20).dictionary_encode()
    path = write_parquet(tmp_path / "corpus.parquet", pa.array(PLAIN, pa.large_string()), lang=langs)
    counts, _ = split(path, tmp_path)
    assert counts["sentences_by_language"] == {"en": 20, "de": 20, "und": 20}


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.tuples(st.sampled_from(["ab", "Ef", "eF", *"ghijkLlmnop"]), st.integers(0, 12)), min_size=9),
    seed=st.integers(0, 3),
)
def test_neither_a_text_nor_a_group_is_in_two_splits(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, int]], seed: int
) -> None:
    directory = tmp_path_factory.mktemp("corpus")
    # A text's group is a function of the text, and -1 for every third, as where no translation is known.
    lines = [{"text": text, "group": -1 if group % 3 == 0 else group} for text, group in rows]
    group_of = {}
    for line in lines:
        line["group"] = group_of.setdefault(str(line["text"]).casefold(), line["group"])
    path = write_lines(directory / "corpus.jsonl", *lines)
    split_corpus(config(path), directory, seed)
    tables = {name: pq.read_table(directory / f"{name}.parquet").to_pylist() for name in SPLITS}
    texts = {name: {row["text"].casefold() for row in table} for name, table in tables.items()}
    groups = {name: {row["group"] for row in table if row["group"] >= 0} for name, table in tables.items()}
    for one, other in (("train", "validation"), ("train", "held_out"), ("validation", "held_out")):
        assert not texts[one] & texts[other]
        assert not groups[one] & groups[other]


def test_a_text_of_two_groups_is_in_one_split(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "corpus.jsonl", *({"text": "Save", "group": group} for group in range(40)))
    _, tables = split(path, tmp_path)
    assert sum("Save" in tables[name]["text"].to_pylist() for name in SPLITS) == 1


def test_the_seed_decides_the_splits(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "corpus.jsonl")
    (tmp_path / "out").mkdir()
    found = []
    for seed in (0, 0, 1):
        split_corpus(config(path), tmp_path / "out", seed)
        found.append(pq.read_table(tmp_path / "out" / "train.parquet")["text"].to_pylist())
    assert found[0] == found[1] != found[2]


def test_shares_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "corpus.parquet"
    write_parquet(path, pa.array([f"text {number}" for number in range(20_000)]))
    counts, _ = split(path, tmp_path, validation_share=0.05, held_out_share=0.1)
    assert counts["splits"]["validation"] == pytest.approx(1000, rel=0.15)
    assert counts["splits"]["held_out"] == pytest.approx(2000, rel=0.15)


def test_only_the_languages_asked_for(tmp_path: Path, tiny_corpus: Path) -> None:
    counts, tables = split(tiny_corpus, tmp_path, languages=["ko", "ja"])
    assert counts["sentences_by_language"] == {"ko": 24, "ja": 24}
    assert counts["splits"]["other_language"] == 336 - 48
    assert {lang for name in SPLITS for lang in tables[name]["lang"].to_pylist()} == {"ko", "ja"}


def test_a_language_without_text_is_refused(tmp_path: Path, tiny_corpus: Path) -> None:
    with pytest.raises(DataError, match=r"corpus\.languages: \['sw'\]: no text in .*it has \['en', 'ko'\]"):
        split(tiny_corpus, tmp_path, languages=["en", "ko", "sw"])


def test_too_few_texts_are_refused_with_the_count(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"text": "one"}\n{"text": ""}\n')
    with pytest.raises(DataError, match=r"1 usable texts leave \[.*\] empty \(quarantined: \{'empty': 1\}\)"):
        split(path, tmp_path)


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        (pa.array([1, 2]), "column 'text' is int64; expected string"),
        (pa.array([["a"], ["b"]]), r"column 'text' is list<.*>; expected string"),
        (pa.array([b"a", b"b"]), "column 'text' is binary; expected string"),
    ],
)
def test_a_text_column_of_another_type_is_refused(tmp_path: Path, texts: pa.Array, reason: str) -> None:
    path = write_parquet(tmp_path / "corpus.parquet", texts)
    with pytest.raises(DataError, match=rf"corpus\.parquet: {reason}"):
        split(path, tmp_path)


def test_no_text_column_is_refused_by_what_there_is(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["a"], "lang": ["en"]}), tmp_path / "corpus.parquet")
    with pytest.raises(DataError, match=r"no column 'text'; it has \['body', 'lang'\]"):
        split(tmp_path / "corpus.parquet", tmp_path)


def test_json_lines_without_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text('{"body": "a"}\n')
    with pytest.raises(DataError, match="no line is a JSON object with 'text'"):
        split(tmp_path / "corpus.jsonl", tmp_path)


def test_a_broken_parquet_file_is_refused(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "corpus.parquet", pa.array(PLAIN * 100))
    whole = path.read_bytes()
    for content in (b"", b"PAR1 no more", whole[: len(whole) // 2], whole[:8] + b"\xff" * 200 + whole[208:]):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"corpus\.parquet: not a readable Parquet file"):
            list(read_rows(path))


@contextmanager
def as_nobody() -> Iterator[None]:
    """Root reads everything, so be somebody else for a while."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("name", ["corpus.jsonl", "corpus.parquet"])
def test_an_unreadable_file_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("x")
    path.chmod(0)
    with as_nobody(), pytest.raises(DataError, match="Permission denied"):
        list(read_rows(path))


def test_a_file_that_vanishes_is_told(tmp_path: Path) -> None:
    for name in ("corpus.jsonl", "corpus.parquet"):
        with pytest.raises(DataError, match="No such file"):
            list(read_rows(tmp_path / name))


def test_a_path_names_a_file_a_directory_or_a_glob(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.parquet", "deep/c.json", "README.md", "_SUCCESS", ".hidden.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    names = [path.name for path in corpus_files(str(tmp_path))]
    assert names == ["a.parquet", "b.jsonl", "c.json"]
    assert [path.name for path in corpus_files(str(tmp_path / "*.jsonl"))] == ["b.jsonl"]
    assert [path.name for path in corpus_files(str(tmp_path / "a.parquet"))] == ["a.parquet"]


@pytest.mark.parametrize("name", ["nowhere.parquet", "nowhere/*.jsonl", "empty"])
def test_a_missing_path_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"corpus\.path: .*: no such file, directory or glob"):
        corpus_files(str(tmp_path / name))


def test_an_unknown_ending_is_refused(tmp_path: Path) -> None:
    (tmp_path / "corpus.csv").touch()
    (tmp_path / "corpus.jsonl").touch()
    for path in (tmp_path / "corpus.csv", tmp_path / "corpus.*"):
        with pytest.raises(DataError, match=r"corpus\.csv: unknown ending; expected \.parquet, \.jsonl or \.json"):
            corpus_files(str(path))


HOSTILE: dict[str, bytes] = {
    "half a pair": b'"\\ud800"',
    "deep nesting": b"[" * 100_000,
    "endless number": b'{"text": ' + b"9" * 5000 + b"}",
    "half a pair in lang": b'{"text": "a", "lang": "\\ud800"}',
    "huge group": b'{"text": "a", "group": 99999999999999999999}',
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_json_lines_do_not_stop_the_run(tmp_path: Path, name: str) -> None:
    counts, tables = split(write_lines(tmp_path / "corpus.jsonl", HOSTILE[name]), tmp_path)
    assert set(PLAIN) <= set(all_texts(tables))
    assert sum(counts["quarantined"].values()) + len(all_texts(tables)) == len(PLAIN) + 1


def test_invalid_utf8_in_lang_does_not_stop_the_run(tmp_path: Path) -> None:
    langs = invalid_utf8([b"\xff"] + [b"en"] * (len(PLAIN) - 1))
    counts, _ = split(write_parquet(tmp_path / "corpus.parquet", pa.array(PLAIN), lang=langs), tmp_path)
    assert counts["sentences_by_language"]["en"] == len(PLAIN) - 1


@pytest.mark.parametrize("kind", [pa.float64(), pa.string()])
def test_a_group_column_of_another_type_is_refused(tmp_path: Path, kind: pa.DataType) -> None:
    groups = pa.array([number // 2 for number in range(len(PLAIN))]).cast(kind)
    path = write_parquet(tmp_path / "corpus.parquet", pa.array(PLAIN), group=groups)
    with pytest.raises(DataError, match="group"):
        split(path, tmp_path)


def test_long_texts_can_be_left_out(tiny_corpus: Path, tmp_path: Path) -> None:
    chosen = choose(tiny_corpus, tmp_path / "short", 1000, 1.0, 0, 12)
    lengths = [len(text) for text in pq.read_table(tiny_corpus)["text"].to_pylist()]
    assert len(chosen) == sum(length <= 12 for length in lengths) < len(lengths)
    assert max(map(len, chosen["text"].to_pylist())) == 12
    assert len(choose(tiny_corpus, tmp_path / "few", 20, 0.5, 0, 12)) == 20


def test_texts_by_language(tiny_corpus: Path) -> None:
    texts = texts_by_language(tiny_corpus, 100, 0)
    assert len(texts) == 14
    assert {len(found) for found in texts.values()} == {24}
    assert texts["en"][0] == "the cat is small"


def choose(path: Path, tmp_path: Path, *arguments: Any) -> pa.Table:
    tmp_path.mkdir(exist_ok=True)
    count = choose_texts(path, tmp_path, *arguments)
    table = pq.read_table(tmp_path / "texts.parquet")
    assert table.schema.equals(CORPUS)
    assert table["id"].to_pylist() == list(range(count))
    return table


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """9,000 English texts, 900 German, 100 Thai, mixed."""
    langs = np.random.default_rng(0).permutation(["en"] * 9000 + ["de"] * 900 + ["th"] * 100).tolist()
    columns = [list(range(10_000)), [f"text {number}" for number in range(10_000)], langs, [-1] * 10_000]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, CORPUS, strict=True)]
    path = tmp_path_factory.mktemp("uneven") / "train.parquet"
    pq.write_table(pa.Table.from_arrays(arrays, schema=CORPUS), path)
    return path


def test_texts_of_a_language_are_drawn_by_the_seed(uneven: Path) -> None:
    table = pq.read_table(uneven)
    in_order: dict[str, list[str]] = {}
    for text, lang in zip(table["text"].to_pylist(), table["lang"].to_pylist(), strict=True):
        in_order.setdefault(lang, []).append(text)
    first, again, other = (texts_by_language(uneven, 500, seed) for seed in (1, 1, 2))
    assert list(first) == ["de", "en", "th"]
    assert [len(texts) for texts in first.values()] == [500, 500, 100]
    # What drawing from lists of all texts gives, language by language.
    random = Random(1)
    assert (
        first
        == again
        == {
            "de": random.sample(in_order["de"], 500),
            "en": random.sample(in_order["en"], 500),
            "th": in_order["th"],
        }
    )
    assert other["th"] == first["th"]
    assert set(other["de"]) != set(first["de"])


@pytest.mark.parametrize(
    ("temperature", "expected"), [(1.0, {"en": 270, "de": 27, "th": 3}), (0.0, {"en": 100, "de": 100, "th": 100})]
)
def test_temperature_moves_from_the_corpus_balance_to_equal_shares(
    uneven: Path, tmp_path: Path, temperature: float, expected: dict[str, int]
) -> None:
    table = choose(uneven, tmp_path, 300, temperature, 0)
    counts = Counter(table["lang"].to_pylist())
    assert counts.total() == 300
    if temperature == 1:
        assert all(abs(counts[lang] - number) <= 4 * number**0.5 for lang, number in expected.items())
    else:
        # Thai has only 100 texts, so a draw of 300 takes fewer than all of them, and no others instead.
        assert 50 <= counts["th"] <= 100
        assert counts["en"] == pytest.approx(counts["de"], rel=0.3)


def test_rows_are_kept_whole_in_order_and_by_seed(uneven: Path, tmp_path: Path) -> None:
    first, again, other = (choose(uneven, tmp_path / str(n), 500, 0.5, seed) for n, seed in enumerate((0, 0, 1)))
    assert first.equals(again)
    assert not first.equals(other)
    numbers = [int(text.split()[1]) for text in first["text"].to_pylist()]
    assert numbers == sorted(set(numbers))
    langs = pq.read_table(uneven)["lang"].to_pylist()
    assert first["lang"].to_pylist() == [langs[number] for number in numbers]


@pytest.mark.parametrize("max_texts", [336, 10_000])
def test_all_texts_where_there_are_no_more(tiny_corpus: Path, tmp_path: Path, max_texts: int) -> None:
    assert choose(tiny_corpus, tmp_path, max_texts, 0.5, 0).equals(pq.read_table(tiny_corpus))
