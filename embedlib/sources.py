"""Rows of text to embed: found, checked at the door and cut into parts, whatever kind of file they lie in.

Parquet is read where it lies, batch by batch. JSON Lines, CSV and plain text know no rows to start from, so
they are turned into Parquet once, line by line.
"""

import csv
import io
import json
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from glob import glob
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from embedlib.config import Config
from embedlib.errors import DataError
from embedlib.schemas import QUARANTINE
from embedlib.storage import Store

LINES, CSV, TEXT = (".jsonl", ".ndjson", ".json"), (".csv",), (".txt",)
ENDINGS = (".parquet", *LINES, *CSV, *TEXT)
CONVERT_ROWS = READ_ROWS = 8192
EXCERPT_CHARACTERS = 200
MAX_CSV_FIELD = 1 << 27
# Column of a converted file: why a line is no row; its number stays that of the line.
REASON = "_reason"


class ColumnsConfig(Config):
    """Which columns of the input matter."""

    text: str = "text"
    """What is embedded; a plain text file has one text a line."""
    id: str | None = None
    """What identifies a row in the output; none: the column `id` where there is one, else the row's number from 0."""
    keep: list[str] = Field(default_factory=list)
    """Columns that go along with the vectors."""

    @property
    def names(self) -> list[str]:
        """All columns that must be there."""
        return list(dict.fromkeys([self.text, *([self.id] if self.id else []), *self.keep]))


class Rejected(NamedTuple):
    """A row that cannot be embedded."""

    source: str
    row: int
    reason: str
    excerpt: str


class Part(NamedTuple):
    """Consecutive rows of one Parquet file."""

    file: str
    start: int
    num_rows: int
    first_row: int
    """Number of its first row over all the input."""


class Texts(NamedTuple):
    """The rows of a part that can be embedded, and those that cannot."""

    rows: pa.Table
    """`id`, `text` and the columns to keep."""
    numbers: list[int]
    """Number of each row over all the input."""
    rejected: list[Rejected]


def input_files(uri: str) -> list[Store]:
    """The files that `uri` names: one, those below a directory, or those of a local glob. DataError where none is."""
    base = Store.at(uri)
    if base.is_local and not base.exists():
        found = [Store.at(name) for name in sorted(glob(base.path, recursive=True))]
    else:
        found = [base] if base.info.is_file else base.files(recursive=True)
    if not found:
        # As the store names itself: a URI may hold a secret.
        raise DataError(f"input: {uri if base.is_local else base}: no such file, directory or glob")
    for file in found:
        if Path(file.path).suffix.lower() not in ENDINGS:
            raise DataError(f"input: {file}: unknown ending; expected one of {', '.join(ENDINGS)}")
    return found


def is_parquet(file: Store) -> bool:
    """Whether a file can be read where it lies."""
    return file.path.lower().endswith(".parquet")


def open_parquet(file: Store, columns: ColumnsConfig) -> pq.ParquetFile:
    """A Parquet file that has the columns asked for; DataError where it has not, or is none."""
    try:
        parquet = pq.ParquetFile(file.path, filesystem=file.filesystem)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{file}: not a readable Parquet file: {error}") from error
    schema = parquet.schema_arrow
    if missing := [name for name in columns.names if name not in schema.names]:
        raise DataError(f"{file}: no column {missing[0]!r}; it has {schema.names}")
    kind = schema.field(columns.text).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise DataError(f"{file}: column {columns.text!r} is {kind}; expected string")
    return parquet


def plan_parts(files: Sequence[Store], columns: ColumnsConfig, rows_per_part: int) -> list[Part]:
    """All rows of the Parquet `files` in parts of at most `rows_per_part`; a part has rows of one file alone."""
    parts: list[Part] = []
    first = 0
    for file in files:
        num_rows = open_parquet(file, columns).metadata.num_rows
        for start in range(0, num_rows, rows_per_part):
            rows = min(rows_per_part, num_rows - start)
            parts += [Part(file.path, start, rows, first + start)]
        first += num_rows
    return parts


def read_part(part: Part, like: Store, columns: ColumnsConfig, max_characters: int) -> Texts:
    """The rows of a part, on the filesystem of `like`, checked."""
    file = Store(like.filesystem, part.file)
    parquet = open_parquet(file, columns)
    if (found := parquet.metadata.num_rows) < part.start + part.num_rows:
        raise DataError(f"{file}: {found} rows; expected {part.start + part.num_rows} or more, as when this run began")
    optional = [REASON, *(["id"] if columns.id is None else [])]
    names = [*columns.names, *(name for name in optional if name in parquet.schema_arrow.names)]
    try:
        rows = pa.Table.from_batches(read_rows(parquet, list(dict.fromkeys(names)), part.start, part.num_rows))
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{file}: rows {part.start} and after cannot be read: {error}") from error
    return check_texts(rows, part, columns, max_characters)


def read_rows(parquet: pq.ParquetFile, columns: Sequence[str], start: int, num_rows: int) -> Iterator[pa.RecordBatch]:
    """Some rows from number `start` on, a batch at a time: a row group may hold far more."""
    ends = list(accumulate(parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)))
    first, last = bisect_right(ends, start), bisect_left(ends, start + num_rows)
    row = ends[first - 1] if first else 0
    for batch in parquet.iter_batches(READ_ROWS, range(first, last + 1), columns):
        begin, end = max(start - row, 0), min(start + num_rows - row, len(batch))
        if begin < end:
            yield batch.slice(begin, end - begin)
        row += len(batch)
        if row >= start + num_rows:
            break


def check_texts(rows: pa.Table, part: Part, columns: ColumnsConfig, max_characters: int) -> Texts:
    """`rows` without those whose text is null, empty, too long or not UTF-8."""
    texts, kept, rejected = [], [], []
    contents = rows[columns.text].cast(pa.large_binary()).to_pylist()
    reasons = rows[REASON].to_pylist() if REASON in rows.column_names else [None] * len(rows)
    for number, (content, broken) in enumerate(zip(contents, reasons, strict=True)):
        text, reason = ("", broken) if broken else _usable(content, max_characters)
        if reason:
            excerpt = (content or b"")[: EXCERPT_CHARACTERS * 4].decode(errors="replace")[:EXCERPT_CHARACTERS]
            rejected.append(Rejected(part.file, part.start + number, reason, excerpt))
        else:
            texts.append(text)
            kept.append(number)
    numbers = [part.first_row + number for number in kept]
    chosen = rows.take(pa.array(kept, pa.int64())) if rejected else rows
    id_column = columns.id or ("id" if "id" in rows.column_names else None)
    ids = chosen[id_column] if id_column else pa.array(numbers, pa.int64())
    table = {"id": ids, "text": pa.array(texts, pa.large_string())}
    table |= {name: chosen[name] for name in columns.keep if name not in table}
    return Texts(pa.table(table), numbers, rejected)


def _usable(content: bytes | None, max_characters: int) -> tuple[str, str]:
    if content is None:
        return "", "null"
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return "", "invalid UTF-8"
    if not text.strip():
        return "", "empty"
    return (text, "") if len(text) <= max_characters else ("", f"longer than {max_characters} characters")


def rejected_table(rejected: Iterable[Rejected]) -> pa.Table:
    """QUARANTINE rows."""
    return pa.Table.from_pylist([row._asdict() for row in rejected], QUARANTINE)


def convert(file: Store, target: Path, columns: ColumnsConfig) -> None:
    """Write the lines of a JSON Lines, CSV or text file as rows of the Parquet file `target`, the broken ones marked.

    A column's type is that of its first values; DataError where a later value does not fit it, or a column is missing.
    """
    with file.filesystem.open_input_stream(file.path) as stream, io.BufferedReader(stream, 1 << 20) as lines:
        rows = _rows(file, lines, columns)
        first = list(islice(rows, CONVERT_ROWS))
        if all(row.get(REASON) for row in first):
            raise DataError(f"{file}: no rows with {columns.names} among its first {len(first)} lines")
        optional = [] if columns.id or not all("id" in row for row in first) else ["id"]
        chunk = _chunk(file, first, [*columns.names, *optional, REASON], columns.text, None)
        with pq.ParquetWriter(target, chunk.schema, compression="zstd") as writer:
            writer.write_table(chunk)
            while following := list(islice(rows, CONVERT_ROWS)):
                writer.write_table(_chunk(file, following, chunk.schema.names, columns.text, chunk.schema))


def _chunk(
    file: Store, rows: list[dict[str, Any]], names: Sequence[str], text: str, schema: pa.Schema | None
) -> pa.Table:
    arrays = {}
    for name in names:
        kind = schema.field(name).type if schema else pa.string() if name == REASON else None
        kind = pa.large_binary() if name == text else kind
        values = [row.get(name) for row in rows]
        try:
            array = pa.array(values, kind)
            arrays[name] = array.view(pa.large_string()) if name == text else array
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
            raise DataError(f"{file}: column {name!r}: values of different types: {error}") from error
    return pa.table(arrays)


def _rows(file: Store, lines: io.BufferedReader, columns: ColumnsConfig) -> Iterator[dict[str, Any]]:
    """Each line as a row with its text as bytes."""
    suffix = Path(file.path).suffix.lower()
    if suffix in CSV:
        return _csv_rows(file, lines, columns)
    if suffix in LINES:
        return (_json_row(line, columns.text) for line in lines)
    if columns.names != [columns.text]:
        raise DataError(f"{file}: a text file has no columns {columns.names[1:]}; expected texts alone, one a line")
    return ({columns.text: line.rstrip(b"\r\n")} for line in lines)


def _json_row(line: bytes, column: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        return {column: line, REASON: "invalid UTF-8" if isinstance(error, UnicodeDecodeError) else "not JSON"}
    if not isinstance(record, dict) or column not in record:
        return {column: line, REASON: f"no {column!r}"}
    text = record[column]
    if text is None or isinstance(text, str):
        return record | {column: None if text is None else text.encode(errors="surrogatepass")}
    return {column: line, REASON: f"{column!r} is {type(text).__name__}"}


def _csv_rows(file: Store, lines: io.BufferedReader, columns: ColumnsConfig) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(MAX_CSV_FIELD)
    # Bytes that are no UTF-8 come through as lone surrogates, to be told as such.
    reader = csv.DictReader(io.TextIOWrapper(lines, encoding="utf-8-sig", errors="surrogateescape", newline=""))
    if missing := [name for name in columns.names if name not in (reader.fieldnames or [])]:
        raise DataError(f"{file}: no column {missing[0]!r}; it has {reader.fieldnames}")
    for row in reader:
        text = row[columns.text]
        yield row | {columns.text: None if text is None else text.encode(errors="surrogateescape")}
