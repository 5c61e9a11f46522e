"""Pairs of a query and a passage that answers it, as distinct queries with all their positives."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from embedlib.config import Config
from embedlib.errors import DataError
from embedlib.sources import ColumnsConfig, Part, Rejected, check_texts, input_files, is_parquet, open_parquet

READ_ROWS = 65536


class PairColumns(Config):
    """Which columns of the pairs, and of the corpus, matter."""

    query: str = "query"
    """Of the pairs: what is asked."""
    positive: str = "positive"
    """Of the pairs: what answers it."""
    text: str = "text"
    """Of the corpus: the passages."""
    lang: str | None = None
    """Of both: the language of passages, and of queries too where these have none of their own; rule.language compares
    them."""
    query_lang: str | None = None
    """Of the pairs: the language of queries, where it may be another one than that of their positives."""
    document: str | None = None
    """Of both: what a passage is part of; passages of a positive's own document are no negatives of its query."""


class Pairs(NamedTuple):
    """Distinct queries, distinct positives, and which belongs to which."""

    queries: pa.Table
    """`id` from 0, `text`, and `lang` where known, in the order of their first pairs."""
    positives: pa.Table
    """`id` from 0, `text`, and `lang` and `document` where known."""
    links: npt.NDArray[np.int64]
    """(pairs, 2): query and positive by id, each pair once, sorted."""
    rejected: list[Rejected]
    """Pairs without a query or a positive that can be embedded."""


def read_pairs(uri: str, columns: PairColumns, max_characters: int) -> Pairs:
    """All pairs of Parquet files; DataError where a column is missing or no pair is left.

    Their texts are held in memory; the corpus, which may be larger, is not read here.
    """
    tables: list[pa.Table] = []
    rejected: list[Rejected] = []
    for part, rows in _parts(uri, columns):
        queries = check_texts(rows, part, ColumnsConfig(text="query"), max_characters)
        positives = check_texts(rows, part, ColumnsConfig(text="positive"), max_characters)
        broken = {row.row: row for row in (*positives.rejected, *queries.rejected)}
        rejected += [broken[number] for number in sorted(broken)]
        usable = np.intersect1d(queries.numbers, positives.numbers) - part.first_row
        tables.append(rows.take(pa.array(usable, pa.int64())))
    table = pa.concat_tables(tables) if tables else pa.table({})
    if not len(table):
        raise DataError(f"pairs: {uri!r}: no pair that can be used; {len(rejected)} rejected")
    query, queries = _distinct(table, "query", ["query_lang"])
    queries = queries.rename_columns(["lang" if name == "query_lang" else name for name in queries.column_names])
    positive, positives = _distinct(table, "positive", ["lang", "document"])
    return Pairs(queries, positives, np.unique(np.stack([query, positive], axis=1), axis=0), rejected)


def _parts(uri: str, columns: PairColumns) -> Iterator[tuple[Part, pa.Table]]:
    """The rows of all files, some at a time, under the names query, positive, lang and document."""
    names = {"query": columns.query, "positive": columns.positive, "lang": columns.lang, "document": columns.document}
    names["query_lang"] = columns.query_lang or columns.lang
    chosen = {name: column for name, column in names.items() if column}
    first = 0
    for file in input_files(uri):
        if not is_parquet(file):
            raise DataError(f"pairs: {file}: expected Parquet")
        for name in (columns.query, columns.positive):
            parquet = open_parquet(file, ColumnsConfig(text=name, keep=list(chosen.values())))
        start = 0
        for batch in parquet.iter_batches(READ_ROWS, columns=list(dict.fromkeys(chosen.values()))):
            rows = pa.table({name: batch[column] for name, column in chosen.items()})
            yield Part(file.path, start, len(rows), first), rows
            start, first = start + len(rows), first + len(rows)


def _distinct(table: pa.Table, name: str, more: list[str]) -> tuple[npt.NDArray[np.int64], pa.Table]:
    """For each row the number of its text in column `name`, and the distinct texts with what else is known of each."""
    texts = table[name].cast(pa.large_string()).combine_chunks().dictionary_encode()
    numbers = texts.indices.to_numpy().astype(np.int64)
    _, firsts = np.unique(numbers, return_index=True)
    columns = {"id": pa.array(np.arange(len(firsts))), "text": texts.dictionary}
    columns |= {other: table[other].take(pa.array(firsts)) for other in more if other in table.column_names}
    return numbers, pa.table(columns)
