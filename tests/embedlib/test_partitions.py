"""Equal rows, splits and samples within a range of hashes, against slow and plain readings of the same rules."""

import random
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedlib.errors import ArtifactError
from embedlib.hashing import Hashes, hash_texts, split_of
from embedlib.partitions import (
    DUPLICATE,
    IN_TWO_SPLITS,
    SEEN_BEFORE,
    Earlier,
    by_split,
    count_languages,
    distinct_rows,
    partitioned,
    read_batch,
    read_statistics,
    sampled,
    without_copies,
    write_batches,
)
from embedlib.refining import ROWS
from embedlib.storage import Store

NOTHING = Earlier(Hashes(np.empty(0, np.uint64), np.empty(0, np.uint64)), np.empty(0, np.uint64))
SHARES = (0.3, 0.3)


def make_rows(texts: list[str], groups: list[int | None] | None = None, langs: list[str] | None = None) -> pa.Table:
    hashes = hash_texts(pa.array(texts, pa.large_string()), 0)
    columns = [
        *(hashes.high, hashes.low, texts, langs or ["en"] * len(texts)),
        *(pa.nulls(len(texts), pa.large_string()), pa.nulls(len(texts), pa.string())),
        *(np.arange(len(texts), dtype=np.int32), pa.array(groups or [None] * len(texts), pa.uint64())),
    ]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, ROWS, strict=True)]
    return pa.Table.from_arrays(arrays, schema=ROWS)


@settings(deadline=None)  # Arrow's first grouping takes a second
@given(st.lists(st.sampled_from("abcdefgh"), max_size=40), st.sets(st.sampled_from("abcxyz")))
def test_of_equal_rows_the_first_stays(texts: list[str], earlier: set[str]) -> None:
    rows = make_rows(texts)
    before = hash_texts(pa.array(sorted(earlier), pa.large_string()), 0)
    found = distinct_rows(rows, Earlier(before, before.high), SHARES)
    expected = {text: texts.index(text) for text in texts if text not in earlier}
    assert dict(zip(found.rows["text"].to_pylist(), found.rows["source"].to_pylist(), strict=True)) == expected
    keys = list(zip(found.rows["high"].to_pylist(), found.rows["low"].to_pylist(), strict=True))
    assert keys == sorted(keys)
    reasons: dict[str, int] = defaultdict(int)
    for (_, _, reason), count in found.dropped.items():
        reasons[reason] += count
    new = [text for text in texts if text not in earlier]
    assert reasons.get(SEEN_BEFORE, 0) == len(texts) - len(new)
    assert reasons.get(DUPLICATE, 0) == len(new) - len(set(new))
    assert len(found.rows) + sum(reasons.values()) == len(texts)


@settings(deadline=None)  # Arrow's first grouping takes a second
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.one_of(st.none(), st.integers(0, 2**64 - 1))), max_size=20))
def test_no_text_ties_two_splits_together(pairs: list[tuple[str, int | None]]) -> None:
    rows = make_rows([text for text, _ in pairs], [group for _, group in pairs])
    found = distinct_rows(rows, NOTHING, SHARES)
    groups = defaultdict(list)
    for text, group in pairs:
        if group is not None:
            groups[text].append(group)
    kept = dict(zip(found.rows["text"].to_pylist(), found.rows["group"].to_pylist(), strict=True))
    for text in {text for text, _ in pairs}:
        splits = {int(split_of(np.array([group], np.uint64), SHARES)[0]) for group in groups[text]}
        assert (text in kept) == (len(splits) < 2)
        if text in kept:
            first = next(group for each, group in pairs if each == text)
            assert kept[text] == (first if first is not None else next(iter(groups[text]), None))
    assert sum(found.dropped[key] for key in found.dropped if key[2] == IN_TWO_SPLITS) == len(groups) - len(
        {*kept} & {*groups}
    )


def test_a_text_lies_with_its_group_or_by_itself() -> None:
    texts = [f"t{number}" for number in range(500)]
    rows = make_rows(texts, [None if number % 2 else number * 2**54 for number in range(500)])
    splits = by_split(rows, SHARES)
    assert sum(map(len, splits)) == 500
    for number, split in enumerate(splits):
        keys = pc.coalesce(split["group"], split["high"]).to_pylist()
        assert set(split_of(np.array(keys, np.uint64), SHARES).tolist()) == {number}


def test_partitions_are_all_rows_in_order() -> None:
    rows = make_rows([f"t{number}" for number in range(300)])
    pieces = partitioned(rows, 7)
    assert len(pieces) == 7
    assert sorted(pa.concat_tables(pieces)["source"].to_pylist()) == list(range(300))
    edges = [(piece["high"].to_pylist(), piece["source"].to_pylist()) for piece in pieces]
    assert all(max(one) < min(two) for (one, _), (two, _) in pairwise(edges))
    assert all(sources == sorted(sources) for _, sources in edges)
    assert [len(piece) for piece in partitioned(rows.slice(0, 0), 3)] == [0, 0, 0]


def test_samples_are_exact_and_do_not_depend_on_the_order() -> None:
    langs = random.Random(0).choices(["en", "de"], k=200)
    rows = make_rows([f"t{number}" for number in range(200)], langs=langs)
    found = sampled(rows, {"en": 30, "de": 1000})
    assert count_languages(found) == {"en": 30, "de": langs.count("de")}
    assert found["source"].to_pylist() == sorted(found["source"].to_pylist())
    backwards = sampled(rows.take(list(range(199, -1, -1))), {"en": 30, "de": 1000})
    assert set(backwards["text"].to_pylist()) == set(found["text"].to_pylist())
    english = rows.filter(pc.equal(rows["lang"], "en"))["low"].to_pylist()
    assert sorted(found.filter(pc.equal(found["lang"], "en"))["low"].to_pylist()) == sorted(english)[:30]
    assert len(sampled(rows, {})) == 0
    assert len(sampled(rows.slice(0, 0), {"en": 1})) == 0


def test_a_file_gives_back_its_batches_columns_and_statistics(tmp_path: Path) -> None:
    file = Store.at(str(tmp_path / "a.arrow"))
    rows = make_rows(["a", "b", "c"], [1, None, 2**64 - 1])
    write_batches(file, [rows, rows.slice(0, 0), rows.slice(1)], {"dropped": [[0, "en", "ü", 3]]})
    assert read_batch(file, 0).equals(rows)
    assert read_batch(file, 1).equals(rows.slice(0, 0))
    assert read_batch(file, 2, ["low", "text"])["text"].to_pylist() == ["b", "c"]
    assert read_statistics(file) == {"dropped": [[0, "en", "ü", 3]]}
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_batch(Store.at(str(tmp_path / "none.arrow")), 0)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 2**64 - 1)), min_size=1, max_size=20))
def test_groups_of_another_split_than_earlier_are_torn(pairs: list[tuple[str, int]]) -> None:
    rows = make_rows([text for text, _ in pairs], [group for _, group in pairs])
    before = hash_texts(pa.array(["a", "b", "c"], pa.large_string()), 0)
    keys = np.array([1, 2, 3], np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    splits = dict(zip("abc", split_of(keys, SHARES).tolist(), strict=True))
    expected = {
        group
        for text, group in pairs
        if text in splits and split_of(np.array([group], np.uint64), SHARES)[0] != splits[text]
    }
    assert set(distinct_rows(rows, Earlier(before, keys), SHARES).torn.tolist()) == expected


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from([None, 0, 7])), max_size=30))
def test_copies_within_a_part_go_early(pairs: list[tuple[str, int | None]]) -> None:
    rows = make_rows([text for text, _ in pairs], [group for _, group in pairs], ["de"] * len(pairs))
    found, copies = without_copies(rows)
    assert list(zip(found["text"].to_pylist(), found["group"].to_pylist(), strict=True)) == list(dict.fromkeys(pairs))
    assert copies["de"] == len(pairs) - len(set(pairs))
    assert distinct_rows(found, NOTHING, SHARES).rows.equals(distinct_rows(rows, NOTHING, SHARES).rows)
