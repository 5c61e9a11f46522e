"""Rows by ranges of their hash: files of one batch a range, and what is settled within a range.

A file holds what one piece of work found, in one batch for each range. All batches of a range, file by file, are all
rows that can be equal: whatever compares rows needs no more than one range in memory.
"""

import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from embedlib.errors import ArtifactError
from embedlib.hashing import Hashes, Words, partition_of, run_begins, split_of
from embedlib.storage import Store

STATISTICS = b"embedlib.statistics"
DUPLICATE = "duplicate"
NEAR_DUPLICATE = "near-duplicate"
SEEN_BEFORE = "in an earlier generation"
IN_TWO_SPLITS = "translations in two splits"
BEYOND_QUOTA = "beyond its language's quota"


def write_batches(file: Store, batches: Sequence[pa.Table], statistics: Mapping[str, Any]) -> None:
    """Write one batch for each table, and what is to be known without reading them, as a file that appears whole."""
    schema = batches[0].schema.with_metadata({STATISTICS: json.dumps(statistics, ensure_ascii=False)})
    buffer = io.BytesIO()
    with pa.ipc.new_file(buffer, schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as writer:
        for batch in batches:
            merged = batch.combine_chunks().to_batches()
            writer.write_batch(merged[0] if merged else pa.RecordBatch.from_pylist([], schema))
    file.write(buffer.getbuffer())


def read_batch(file: Store, number: int, columns: Sequence[str] | None = None) -> pa.Table:
    """Batch `number` of a file; only these `columns`, where they are given."""
    with _opened(file) as stream:
        reader = pa.ipc.open_file(stream)
        if columns is not None:
            fields = [reader.schema.get_field_index(name) for name in columns]
            reader = pa.ipc.open_file(stream, options=pa.ipc.IpcReadOptions(included_fields=fields))
        return pa.Table.from_batches([reader.get_batch(number)]).replace_schema_metadata()


@cache
def read_hashes(directory: str, name: str) -> Words:
    """The column `hash` of a file in a directory or store, read once a process."""
    hashes: Words = read_batch(Store.at(directory) / name, 0)["hash"].to_numpy()
    return hashes


def read_statistics(file: Store) -> dict[str, Any]:
    """What a file says of itself."""
    with _opened(file) as stream:
        found: dict[str, Any] = json.loads(pa.ipc.open_file(stream).schema.metadata[STATISTICS])
        return found


def _opened(file: Store) -> pa.NativeFile:
    try:
        return file.filesystem.open_input_file(file.path)
    except OSError as error:
        raise ArtifactError(f"{file}: cannot be read: {error}") from error


def partitioned(rows: pa.Table, num_partitions: int) -> list[pa.Table]:
    """`rows` by partition, each in its order."""
    numbers = partition_of(rows["high"].to_numpy(), num_partitions)
    order = np.argsort(numbers, kind="stable")
    sorted_rows = rows.take(pa.array(order))
    edges = np.searchsorted(numbers[order], np.arange(num_partitions + 1))
    return [sorted_rows.slice(begin, end - begin) for begin, end in pairwise(edges)]


def without_copies(rows: pa.Table) -> tuple[pa.Table, Counter[str]]:
    """`rows` without those equal to an earlier one in text and group, and how many of each language went.

    All copies of a text meet in one partition; what repeats within a part, as lines of a log do, need not get there.
    """
    known = np.asarray(pc.is_valid(rows["group"]))
    groups = np.asarray(pc.fill_null(rows["group"], 0)).astype(np.uint64)
    keys = [groups, known, rows["low"].to_numpy(), rows["high"].to_numpy()]
    order = np.lexsort(keys)
    first = np.zeros(len(rows), np.bool_)
    first[order[run_begins(*(key[order] for key in keys))]] = True
    copies = rows[language_column(rows)].filter(pa.array(~first)).to_pylist()
    return rows.filter(pa.array(first)), Counter(copies)


class Earlier(NamedTuple):
    """Rows of an earlier generation."""

    hashes: Hashes
    keys: Words
    """What decided the split of each: its group, or its own hash."""


class Distinct(NamedTuple):
    """What is left of a partition."""

    rows: pa.Table
    """In the order of their hashes."""
    dropped: Counter[tuple[int, str, str]]
    """Rows by (source, language, reason)."""
    torn: Words
    """Groups whose text an earlier generation has in another split."""


def distinct_rows(rows: pa.Table, earlier: Earlier, shares: Sequence[float]) -> Distinct:
    """Of equal rows the first; none that is in an earlier generation, or has translations in two splits.

    Every copy of a text is here, and with it all that it translates: where those are in different splits the text
    would tie them together, so it is in neither. What an earlier generation has cannot be taken back; those that
    translate it into another split are `torn`.
    """
    high, low = (rows[name].to_numpy() for name in ("high", "low"))
    hashes = Hashes(np.concatenate([earlier.hashes.high, high]), np.concatenate([earlier.hashes.low, low]))
    order = np.lexsort((hashes.low, hashes.high))
    is_first = run_begins(hashes.high[order], hashes.low[order])
    texts = np.cumsum(is_first) - 1
    order = order - len(earlier.keys)
    is_new = order >= 0
    reason = np.full(len(rows), "", object)
    reason[order[is_new & ~is_first]] = DUPLICATE
    seen = np.zeros(int(is_first.sum()), np.bool_)
    seen[texts[~is_new]] = True
    reason[order[is_new & seen[texts]]] = SEEN_BEFORE
    groups, conflicts = _agreed_groups(rows, order[is_new], texts[is_new], len(seen), shares)
    reason[order[is_new & conflicts[texts] & is_first]] = IN_TWO_SPLITS
    kept = order[is_first & is_new]
    kept = kept[reason[kept] == ""]
    counts = _counts(rows, reason)
    keys = np.zeros(len(seen), np.uint64)
    keys[texts[~is_new]] = earlier.keys[order[~is_new]]
    again = is_new & seen[texts]
    torn = _torn_groups(rows, order[again], keys[texts[again]], shares)
    chosen = rows.take(pa.array(kept))
    place = rows.schema.get_field_index("group")
    return Distinct(chosen.set_column(place, rows.schema.field("group"), groups.take(pa.array(kept))), counts, torn)


def _torn_groups(
    rows: pa.Table, again: npt.NDArray[np.int64], keys: Words, shares: Sequence[float]
) -> npt.NDArray[np.uint64]:
    """The groups of rows that come `again` which are in another split than the earlier rows with these `keys`."""
    groups = _column(rows["group"]).take(pa.array(again))
    known = np.asarray(pc.is_valid(groups))
    named = np.asarray(pc.fill_null(groups, 0)).astype(np.uint64)
    return np.unique(named[known & (split_of(named, shares) != split_of(keys, shares))])


def _agreed_groups(
    rows: pa.Table, order: npt.NDArray[np.int64], texts: npt.NDArray[np.int64], num_texts: int, shares: Sequence[float]
) -> tuple[pa.Array, npt.NDArray[np.bool_]]:
    """The group of every row, from its copies where it names none itself; and which texts' groups disagree."""
    groups = _column(rows["group"])
    values = np.asarray(pc.fill_null(groups, 0)).astype(np.uint64)
    known = np.asarray(pc.is_valid(groups))
    conflicts = np.zeros(num_texts, np.bool_)
    named = known[order]
    if not named.any():
        return groups, conflicts
    some, owners = order[named], texts[named]
    splits = split_of(values[some], shares)
    lowest, highest = np.full(num_texts, 127, np.int8), np.full(num_texts, -1, np.int8)
    np.minimum.at(lowest, owners, splits)
    np.maximum.at(highest, owners, splits)
    conflicts = (highest >= 0) & (lowest != highest)
    first = np.full(num_texts, -1, np.int64)
    first[owners[::-1]] = some[::-1]
    lent = np.where(known[order], order, np.where(first[texts] >= 0, first[texts], order))
    source = np.arange(len(values))
    source[order] = lent
    return pa.array(values[source], pa.uint64(), mask=~known[source]), conflicts


def _counts(rows: pa.Table, reason: npt.NDArray[np.object_]) -> Counter[tuple[int, str, str]]:
    """Rows that have a reason, by source, language and reason."""
    dropped = np.flatnonzero(reason != "")
    some = rows.select(["source", language_column(rows)]).take(pa.array(dropped))
    keys = pa.table([*some.columns, pa.array(reason[dropped], pa.string())], names=["source", "lang", "reason"])
    counts = keys.group_by(["source", "lang", "reason"]).aggregate([([], "count_all")]).to_pydict()
    names = zip(counts["source"], counts["lang"], counts["reason"], strict=True)
    return Counter(dict(zip(names, counts["count_all"], strict=True)))


def language_column(rows: pa.Table) -> str:
    """The column of the language that a row counts as: that of its translation, if it has one."""
    return "right_lang" if rows["right_lang"].null_count < max(len(rows), 1) else "lang"


def split_keys(rows: pa.Table) -> Words:
    """What decides the split of each row: its group, or its own hash where it has none."""
    return np.asarray(pc.coalesce(rows["group"], rows["high"])).astype(np.uint64)


def by_split(rows: pa.Table, shares: Sequence[float]) -> list[pa.Table]:
    """`rows` of each split in their order: decided by the group, or by the text where there is none."""
    splits = split_of(split_keys(rows), shares)
    return [rows.filter(pa.array(splits == split)) for split in range(len(shares) + 1)]


def count_languages(rows: pa.Table) -> dict[str, int]:
    """Rows of each language."""
    counts = rows[language_column(rows)].value_counts().to_pylist()
    return {each["values"]: each["counts"] for each in counts}


def sampled(rows: pa.Table, quotas: Mapping[str, int]) -> pa.Table:
    """As many rows of each language as its quota says, those with the lowest second half of the hash, in order."""
    coded = _column(rows[language_column(rows)]).dictionary_encode()
    limits = np.array([quotas.get(lang, 0) for lang in coded.dictionary.to_pylist()], np.int64)
    codes = np.asarray(coded.indices)
    sizes = np.bincount(codes, minlength=len(limits))
    if (sizes <= limits).all():
        return rows
    order = np.lexsort((rows["low"].to_numpy(), codes))
    rank = np.empty(len(rows), np.int64)
    rank[order] = np.arange(len(rows)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return rows.filter(pa.array(rank < limits[codes]))


def count_origins(rows: pa.Table) -> list[tuple[int, str, int]]:
    """Rows by source and language."""
    keys = pa.table([rows["source"], rows[language_column(rows)]], names=["source", "lang"])
    counts = keys.group_by(["source", "lang"]).aggregate([([], "count_all")]).to_pydict()
    return sorted(zip(counts["source"], counts["lang"], counts["count_all"], strict=True))


def _column(chunked: pa.ChunkedArray) -> pa.Array:
    combined = chunked.combine_chunks()
    return combined if isinstance(combined, pa.Array) else pa.concat_arrays(combined.chunks)
