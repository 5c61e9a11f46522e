"""Datasets of queries, positives and negatives, as numbered texts and the samples they make up.

Parquet of pairs, triplets or graded pairs, and what jobs/mine.py writes, are all read as one: a sample is a query, a
positive and any number of negatives. A text is told from another by its prompt as well, since the model is.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from embedlib.artifact import MANIFEST_NAME
from embedlib.batching import NO_TEXT
from embedlib.config import Config
from embedlib.errors import DataError
from embedlib.objective import ObjectiveConfig
from embedlib.sources import ColumnsConfig, Part, Rejected, check_texts, input_files, is_parquet, open_parquet
from embedlib.storage import Store, UserPath

READ_ROWS = 65536


class TrainingData(Config):
    """A dataset of a contrastive stage."""

    path: UserPath
    """Parquet, or what jobs/mine.py wrote: a file, directory or glob."""
    query: str = "query"
    """Column of what is asked, or of one side of a symmetric pair."""
    positive: str = "positive"
    """Column of what answers it: a text, or a list of texts that makes a sample each."""
    negatives: str | None = None
    """Column of what does not: a text or a list of texts."""
    max_negatives: int = Field(default=7, ge=1)
    """So many of a list's first are taken."""
    positive_scores: str | None = None
    """Column of a teacher's score of positive, or a list of them."""
    negative_scores: str | None = None
    """Column of a teacher's scores of negatives, a list as long as theirs."""
    label: str | None = None
    """Column of how like query and positive are, for CoSENT."""
    objective: ObjectiveConfig | None = None
    """What is asked of the vectors of its texts; none: training.objective."""
    lang: str | None = None
    """Column whose values make groups that are not mixed in a batch: a language, or a pair of them."""
    langs: list[str] | None = None
    """Values of that column whose rows are taken; none: all."""
    query_prompt: str | None = "query"
    """Name of the prompt before queries; null: none."""
    document_prompt: str | None = "document"
    """Name of the prompt before positives and negatives; a symmetric dataset has that of its queries."""
    weight: float = Field(default=1.0, gt=0)
    """How much more often an epoch goes through it than through others."""
    max_rows: int | None = Field(default=None, ge=1)
    """So many of its first rows that are taken."""

    @model_validator(mode="after")
    def _languages_have_a_column(self) -> Self:
        if self.langs is not None and self.lang is None:
            raise ValueError(f"langs: {self.langs}, but lang names no column")
        return self


class TrainingTexts(NamedTuple):
    """All samples of several datasets."""

    texts: dict[str | None, pa.Array]
    """Distinct texts by the name of their prompt; numbers go on from one to the next."""
    samples: npt.NDArray[np.int64]
    """(samples, 2 + most negatives) query, positive and negatives by number, `NO_TEXT` where there are fewer."""
    groups: npt.NDArray[np.int64]
    """(samples,)."""
    group_names: list[str]
    datasets: npt.NDArray[np.int64]
    """(groups,) number of the dataset that each group is of."""
    weights: npt.NDArray[np.float64]
    """(groups,)."""
    scores: npt.NDArray[np.float32] | None
    """(samples, 1 + most negatives) −inf where there is no negative, nan in a dataset without scores; none: all are."""
    labels: npt.NDArray[np.float32] | None
    """(samples,) nan in a dataset without labels; none: all are."""
    rejected: list[Rejected]

    def taken(self, rows: npt.NDArray[np.bool_]) -> "TrainingTexts":
        """Those of the samples, with all texts."""
        return self._replace(
            samples=self.samples[rows],
            groups=self.groups[rows],
            scores=None if self.scores is None else self.scores[rows],
            labels=None if self.labels is None else self.labels[rows],
        )

    def without_idle_texts(self) -> "TrainingTexts":
        """The same samples, with the texts that are in one of them alone."""
        used = np.unique(self.samples[self.samples != NO_TEXT])
        texts, first = {}, 0
        for prompt, array in self.texts.items():
            own = used[(used >= first) & (used < first + len(array))] - first
            texts[prompt] = array.take(pa.array(own))
            first += len(array)
        there = self.samples != NO_TEXT
        return self._replace(texts=texts, samples=np.where(there, np.searchsorted(used, self.samples), NO_TEXT))


class _Rows(NamedTuple):
    """Some rows of one dataset, its lists laid flat."""

    number: int
    """Of the dataset."""
    data: TrainingData
    queries: pa.Array
    positives: pa.Array
    negatives: pa.Array
    counts: npt.NDArray[np.int64]
    """Negatives of each row."""
    scores: npt.NDArray[np.float32] | None
    """Of positive and negatives of each row, end to end, (rows + negatives,) with positives first."""
    labels: npt.NDArray[np.float32] | None
    groups: list[str]


def read_training_texts(datasets: Sequence[TrainingData], max_characters: int, key: str = "datasets") -> TrainingTexts:
    """All datasets, which lie at `key` of the configuration.

    DataError where a column is missing, of another type, or no row is left of a dataset.
    """
    chunks: list[_Rows] = []
    rejected: list[Rejected] = []
    for number, data in enumerate(datasets):
        before = len(chunks)
        for rows, broken in _chunks(data, number, max_characters, f"{key}.{number}"):
            rejected += broken
            if len(rows.queries):
                chunks.append(rows)
        if len(chunks) == before:
            raise DataError(f"{key}.{number}: {data.path!r}: no row that can be used; {len(rejected)} rejected")
    return _numbered(chunks, rejected)


def files_of(data: TrainingData) -> list[Store]:
    """The files of a dataset: of what jobs/mine.py wrote its part files alone."""
    is_mined = (Store.at(data.path) / MANIFEST_NAME).exists()
    return input_files(f"{data.path}/part-*.parquet" if is_mined else data.path)


def _chunks(data: TrainingData, number: int, max_characters: int, key: str) -> Iterator[tuple[_Rows, list[Rejected]]]:
    columns = [data.query, data.positive, data.negatives, data.positive_scores, data.negative_scores]
    named = list(dict.fromkeys(name for name in [*columns, data.label, data.lang] if name))
    left = data.max_rows if data.max_rows is not None else np.inf
    for file in files_of(data):
        if not is_parquet(file):
            raise DataError(f"{key}: {file}: expected Parquet")
        start = 0
        parquet = open_parquet(file, ColumnsConfig(text=data.query, keep=named))
        _require_types(parquet.schema_arrow, data, file, key)
        for batch in parquet.iter_batches(READ_ROWS, columns=named):
            rows = pa.table(batch).append_column("_row", pa.array(np.arange(start, start + len(batch))))
            start += len(batch)
            if data.langs is not None:
                rows = rows.filter(pc.is_in(rows[data.lang], pa.array(data.langs)))
            rows = rows.slice(0, int(min(left, len(rows))))
            left -= len(rows)
            yield _checked(rows, data, number, Part(file.path, 0, len(rows), 0), max_characters, key)
            if not left:
                return


def _require_types(schema: pa.Schema, data: TrainingData, file: Store, key: str) -> None:
    """DataError for a column of another type: numbers, say, would be learned from as their digits."""
    texts, numbers = ("positive", "negatives"), ("positive_scores", "negative_scores", "label")
    for names, fits, expected in ((texts, _holds_texts, "text"), (numbers, _holds_numbers, "numbers")):
        for name in names:
            column = getattr(data, name)
            if column and not fits(element := _element(schema.field(column).type)):
                raise DataError(f"{key}.{name}: {column!r} of {file} holds {element}; expected {expected}")


def _element(kind: pa.DataType) -> pa.DataType:
    kind = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _holds_texts(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind))


def _holds_numbers(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind))


def _checked(
    rows: pa.Table, data: TrainingData, number: int, part: Part, max_characters: int, key: str
) -> tuple[_Rows, list[Rejected]]:
    """The rows whose query and positive can be embedded, a row for each positive; negatives that cannot are dropped."""
    for texts, rating in ((data.positive, data.positive_scores), (data.negatives, data.negative_scores)):
        if texts and rating and not np.array_equal(_lengths(rows[texts]), _lengths(rows[rating])):
            unlike = int(rows["_row"][int(np.argmax(_lengths(rows[texts]) != _lengths(rows[rating])))].as_py())
            raise DataError(f"{key}: {part.file}: row {unlike}: {rating!r} is not as long as {texts!r}")
    lists = [name for name in (data.positive, data.positive_scores) if name and _is_list(rows[name])]
    rejected: list[Rejected] = []
    if lists:
        empty = np.flatnonzero(_lengths(rows[data.positive]) == 0)
        places = rows["_row"].to_numpy()[empty]
        rejected += [Rejected(part.file, int(row), f"{data.positive}: none", "") for row in places]
        rows = _exploded(rows, lists)
    numbers = rows["_row"].to_numpy()
    usable = np.ones(len(rows), bool)
    for column in (data.query, data.positive):
        checked = check_texts(rows.select([column]), part, ColumnsConfig(text=column), max_characters)
        usable[[row.row for row in checked.rejected]] = False
        rejected += [
            row._replace(row=int(numbers[row.row]), reason=f"{column}: {row.reason}") for row in checked.rejected
        ]
    rows = rows.filter(pa.array(usable))
    flat, counts, kept = _negatives(rows, data, max_characters)
    scores = None
    if data.positive_scores:
        positive = rows[data.positive_scores].to_numpy().astype(np.float32)
        if data.negatives and not data.negative_scores:
            raise DataError(f"{key}.negative_scores: none; expected the column that scores {data.negatives!r}")
        given = _flat(rows[data.negative_scores])[kept] if data.negative_scores else np.empty(0)
        scores = np.concatenate([positive, given]).astype(np.float32)
    labels = rows[data.label].to_numpy().astype(np.float32) if data.label else None
    for name, values in (("scores", scores), ("label", labels)):
        if values is not None and not np.isfinite(values).all():
            raise DataError(f"{key}: {part.file}: {name} that are not finite numbers")
    langs = rows[data.lang].to_pylist() if data.lang else [""] * len(rows)
    groups = [f"{number}:{lang}" for lang in langs]
    return _Rows(
        number, data, _text(rows[data.query]), _text(rows[data.positive]), flat, counts, scores, labels, groups
    ), rejected


def _negatives(
    rows: pa.Table, data: TrainingData, max_characters: int
) -> tuple[pa.Array, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Negatives end to end, how many each row has, and where those stand in the column laid flat."""
    if data.negatives is None:
        return pa.array([], pa.large_string()), np.zeros(len(rows), np.int64), np.empty(0, np.int64)
    column = rows[data.negatives]
    lengths = _lengths(column)
    flat = _text(pc.list_flatten(column)) if _is_list(column) else _text(column)
    owners = np.repeat(np.arange(len(rows)), lengths)
    places = np.arange(len(owners)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    length = pc.utf8_length(pc.utf8_trim_whitespace(flat))
    usable = pc.fill_null(pc.and_(pc.greater(length, 0), pc.less_equal(length, max_characters)), False).to_numpy(False)
    kept = np.flatnonzero(usable & (places < data.max_negatives))
    return flat.take(pa.array(kept)), np.bincount(owners[kept], minlength=len(rows)), kept


def _exploded(rows: pa.Table, lists: list[str]) -> pa.Table:
    """A row for each element of the list columns, which are equally long."""
    owners = pc.list_parent_indices(rows[lists[0]].combine_chunks())
    others = rows.drop_columns(lists).take(owners)
    for name in lists:
        others = others.append_column(name, pc.list_flatten(rows[name].combine_chunks()))
    return others


def _numbered(chunks: list[_Rows], rejected: list[Rejected]) -> TrainingTexts:
    """Number the distinct texts of each prompt."""
    sides = [
        (
            each.data.query_prompt,
            each.queries,
            each.data.document_prompt,
            pa.concat_arrays([each.positives, each.negatives]),
        )
        for each in chunks
    ]
    texts: dict[str | None, pa.Array] = {}
    numbers: dict[str | None, list[npt.NDArray[np.int64]]] = {}
    first = 0
    for prompt in dict.fromkeys(name for query, _, document, _ in sides for name in (query, document)):
        arrays = [
            array
            for query, queries, document, documents in sides
            for name, array in ((query, queries), (document, documents))
            if name == prompt
        ]
        encoded = pa.chunked_array(arrays).combine_chunks().dictionary_encode()
        texts[prompt] = encoded.dictionary
        indices = encoded.indices.to_numpy().astype(np.int64) + first
        numbers[prompt] = np.split(indices, np.cumsum([len(array) for array in arrays])[:-1])
        first += len(encoded.dictionary)
    samples, labels = [], []
    scores: list[npt.NDArray[Any]] = []
    most = max(int(each.counts.max(initial=0)) for each in chunks)
    for each in chunks:
        queries = numbers[each.data.query_prompt].pop(0)
        documents = numbers[each.data.document_prompt].pop(0)
        samples.append(np.concatenate([queries[:, None], _padded(documents, each.counts, most, NO_TEXT)], axis=1))
    # A pair with a label may be none of query and answer. The last number is no pair's, and above all of them.
    known = [of[:, 0] * first + of[:, 1] for each, of in zip(chunks, samples, strict=True) if each.labels is None]
    answers = np.unique(np.concatenate([*known, [first * first]]))
    for each, numbers_of in zip(chunks, samples, strict=True):
        # A row's own query and positive are no negatives of it, nor is what answers its query in any row.
        pairs = numbers_of[:, :1] * first + numbers_of[:, 2:]
        is_answer = answers[np.searchsorted(answers, pairs)] == pairs
        own = is_answer | (numbers_of[:, 2:] == numbers_of[:, :1]) | (numbers_of[:, 2:] == numbers_of[:, 1:2])
        numbers_of[:, 2:][own] = NO_TEXT
        if each.scores is None:
            scores.append(np.full((len(numbers_of), 1 + most), np.nan, np.float32))
        else:
            scores.append(_padded(each.scores, each.counts, most, -np.inf))
            scores[-1][:, 1:][own] = -np.inf
        labels.append(np.full(len(numbers_of), np.nan, np.float32) if each.labels is None else each.labels)
    names = list(dict.fromkeys(name for each in chunks for name in each.groups))
    number_of = {name: number for number, name in enumerate(names)}
    datasets = {name: each.number for each in chunks for name in each.groups}
    weights = {name: each.data.weight for each in chunks for name in each.groups}
    return TrainingTexts(
        texts,
        np.concatenate(samples),
        np.array([number_of[name] for each in chunks for name in each.groups]),
        names,
        np.array([datasets[name] for name in names]),
        np.array([weights[name] for name in names]),
        np.concatenate(scores) if any(each.scores is not None for each in chunks) else None,
        np.concatenate(labels) if any(each.labels is not None for each in chunks) else None,
        rejected,
    )


def _padded(
    flat: npt.NDArray[np.generic], counts: npt.NDArray[np.int64], most: int, fill: float
) -> npt.NDArray[np.generic]:
    """Positives, then all rows' negatives end to end, as (rows, 1 + most)."""
    table = np.full((len(counts), 1 + most), fill, flat.dtype)
    table[:, 0] = flat[: len(counts)]
    table[:, 1:][np.arange(most) < counts[:, None]] = flat[len(counts) :]
    return table


def _lengths(column: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    """Elements of each row: 1 where the column has no lists, 0 for null."""
    if not _is_list(column):
        return np.ones(len(column), np.int64)
    return np.asarray(pc.fill_null(pc.list_value_length(column), 0).to_numpy(), np.int64)


def _is_list(column: pa.ChunkedArray) -> bool:
    return bool(pa.types.is_list(column.type) or pa.types.is_large_list(column.type))


def _text(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    joined = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return joined.cast(pa.large_string())


def _flat(column: pa.ChunkedArray) -> npt.NDArray[np.float32]:
    values = pc.list_flatten(column) if _is_list(column) else column
    return np.asarray(values.to_numpy(), np.float32)
