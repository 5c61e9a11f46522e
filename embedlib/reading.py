"""Texts, and texts with their translations, in files of any kind: read in a stream, a row at a time.

What cannot be read is a row as well, with the reason why, so that nothing is lost in silence. A line is held up to a
bound and no further, however long it is.
"""

import codecs
import csv
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from glob import glob
from itertools import islice, pairwise
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal, NamedTuple
from xml.etree import ElementTree

import polib
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field, model_validator

from embedlib.catalogues import (
    charset_of,
    english_of_gettext_id,
    read_descriptions,
    read_gettext,
    read_json,
    read_manual,
)
from embedlib.config import Config
from embedlib.errors import DataError
from embedlib.languages import canonical
from embedlib.schemas import UNKNOWN_LANGUAGE
from embedlib.storage import Store

Format = Literal[
    "parquet", "jsonl", "csv", "tsv", "text", "moses", "po", "mo", "tmx", "messages", "descriptions", "manual"
]
FORMATS: dict[str, Format] = {
    ".parquet": "parquet",
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "jsonl"),
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "text",
    ".po": "po",
    ".mo": "mo",
    ".tmx": "tmx",
}
# Texts by keys, which translations share.
KEYED: tuple[Format, ...] = ("messages", "descriptions", "manual")
CHUNK = 1 << 16
# What has to be read as a whole.
LARGEST_CATALOGUE = 1 << 28
CONVERT_ROWS = 8192
EXCERPT_CHARACTERS = 200
# Longest first: that of UTF-32 begins with that of UTF-16.
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
LOCALE = re.compile(r"[a-z]{2,3}([_\-][A-Za-z]{2,4})*(@\w+)?")
XML_LANG = "{http://www.w3.org/XML/1998/namespace}lang"

RAW = pa.schema(
    [
        pa.field("text", pa.large_string()),
        pa.field("lang", pa.string()),
        pa.field("right", pa.large_string()),
        pa.field("right_lang", pa.string()),
        pa.field("group", pa.string()),
        pa.field("reason", pa.string()),  # why the row is none; `text` is then an excerpt of it
    ]
)


class SourceConfig(Config):
    """Files of one kind and one origin."""

    name: str = Field(min_length=1)
    """What rows of it are counted under, and carry as `source`."""
    path: str
    """File, directory or glob, or s3://, gs:// and the like; .gz is opened, Parquet apart. hub:OWNER/NAME, with
    @REVISION or /PATTERN behind it, is a dataset of the hub; package:NAME one of `packages`."""
    format: Format | None = None
    """Kind of file; none: as the ending says. messages: JSON whose values, however deep, are texts; descriptions:
    Translation-xx of Debian's archive; manual: an archive of HTML pages whose paragraphs have ids."""
    originals: str | None = None
    """With messages, descriptions or manual: the file, or a glob of it, whose texts those of `path` translate under the
    same keys; a name alone, `en.json`, is that of a file beside each."""
    passages: bool = False
    """With descriptions or manual: titles, each beside the paragraph below it."""
    translations: str | None = None
    """With format moses: the file whose lines translate those of `path`, one file each."""
    text: str = "text"
    """Column, or key, of the text."""
    right: str | None = None
    """Column of its translation, or of the passage that answers it; none: there is none."""
    lang: str | None = None
    """Language of all texts; none: the column `lang_column`, or what the file says."""
    lang_column: str = "lang"
    """Column of the text's language, if there is one."""
    right_lang: str | None = None
    """Language of all translations; none: the column `right_lang_column`, or what the file says."""
    right_lang_column: str = "right_lang"
    """Column of the translation's language, if there is one."""
    group: str | None = None
    """Column that rows share which translate each other."""
    licence: str | None = None
    """Licence of its texts, which cards of models made of them tell; an SPDX name."""
    encoding: str = "utf-8"
    """Encoding of files that do not begin with a byte order mark."""

    @model_validator(mode="after")
    def _is_whole(self) -> "SourceConfig":
        if (self.format == "moses") != (self.translations is not None):
            raise ValueError("format moses and translations belong together; expected both or neither")
        if self.originals is not None and self.format not in KEYED:
            raise ValueError(f"originals: with format {self.format}; expected one of {', '.join(KEYED)}")
        if self.passages and (self.format not in KEYED[1:] or self.originals):
            raise ValueError("passages: expected format descriptions or manual, and no originals")
        try:
            codecs.lookup(self.encoding)
        except LookupError as error:
            raise ValueError(f"encoding {self.encoding!r} is unknown; expected one that Python knows") from error
        return self

    def format_of(self, file: Store) -> Format | None:
        """What kind of file it is, None where the ending does not say."""
        return self.format or FORMATS.get(PurePosixPath(file.path.lower().removesuffix(".gz")).suffix)


class RawRow(NamedTuple):
    """One row as it was found, or an excerpt and the reason why it is none."""

    text: str | None
    lang: str | None = None
    right: str | None = None
    right_lang: str | None = None
    group: str | None = None
    reason: str | None = None


class Broken(NamedTuple):
    """What stands where a line should."""

    reason: str
    excerpt: bytes = b""

    @property
    def row(self) -> RawRow:
        """It as a row."""
        excerpt = self.excerpt[: EXCERPT_CHARACTERS * 4].decode(errors="replace")
        return RawRow(excerpt[:EXCERPT_CHARACTERS].replace("\0", "␀"), reason=self.reason)


def source_files(source: SourceConfig) -> list[Store]:
    """The files of a source in the order of their names; DataError where there is none that can be read."""
    base = Store.at(source.path)
    if base.is_local and not base.exists():
        found = [Store.at(name) for name in sorted(glob(base.path, recursive=True)) if Path(name).is_file()]
    else:
        found = [base] if base.info.is_file else base.files(recursive=True)
    # Of a directory what is known is read: catalogues lie among other things.
    known = [file for file in found if source.format_of(file)]
    if not known:
        what = f"{len(found)} files of unknown kind" if found else "no such file, directory or glob"
        raise DataError(
            f"sources.{source.name}.path: {source.path if base.is_local else base}: {what}; "
            f"expected {', '.join(FORMATS)}, or a format"
        )
    return known


def is_beside(originals: str) -> bool:
    """Whether this is the name of a file beside each, and no path."""
    return "/" not in originals and ":" not in originals


def originals_of(file: Store, source: SourceConfig) -> Store:
    """The file whose texts those of `file` translate; DataError where it is not there, or more than one is."""
    path = source.originals or ""
    if is_beside(path):
        found = [Store(file.filesystem, str(PurePosixPath(file.path).with_name(path)))]
        found = [beside for beside in found if beside.exists()]
    else:
        found = [Store.at(name) for name in glob(path)] if Store.at(path).is_local else [Store.at(path)]
    if len(found) != 1:
        raise DataError(f"{file}: {len(found)} files of originals {path!r}; expected one")
    return found[0]


def read_rows(file: Store, source: SourceConfig, max_line_bytes: int) -> Iterator[RawRow]:
    """The rows of a file that is no Parquet, in order; none of its lines is held beyond `max_line_bytes`."""
    readers: dict[str, Callable[[Store, SourceConfig, int], Iterator[RawRow]]] = {
        "jsonl": _json_rows,
        "csv": _csv_rows,
        "tsv": _csv_rows,
        "text": _text_rows,
        "moses": _moses_rows,
        "po": _catalogue_rows,
        "mo": _catalogue_rows,
        "tmx": _tmx_rows,
        "messages": _keyed_rows,
        "descriptions": _keyed_rows,
        "manual": _keyed_rows,
    }
    kind = source.format_of(file)
    assert kind is not None  # noqa: S101 (source_files leaves others out)
    for row in readers[kind](file, source, max_line_bytes):
        yield _without_nul(row)


def _without_nul(row: RawRow) -> RawRow:
    """The row, or, where a text of it holds what no text does, why it is none."""
    if row.reason is None:
        for value in filter(None, row):
            if "\0" in value:
                return Broken("NUL", (row.text or value).encode(errors="replace")).row
            if any("\ud800" <= character <= "\udfff" for character in value):
                return Broken("invalid UTF-8", (row.text or value).encode(errors="replace")).row
    return row


def chunks_of(file: Store) -> Iterator[bytes | Broken]:
    """The bytes of a file, unpacked where its name ends in .gz, as far as they can be read."""
    with file.filesystem.open_input_stream(file.path, compression=None) as stream:
        packed = iter(lambda: bytes(stream.read(CHUNK)), b"")
        yield from _unpacked(packed) if file.path.lower().endswith(".gz") else packed


def _unpacked(chunks: Iterator[bytes]) -> Iterator[bytes | Broken]:
    """What gzip members hold, one after the other."""
    member, begun = zlib.decompressobj(wbits=31), False
    for chunk in chunks:
        rest = chunk
        while rest:
            try:
                begun = True
                yield member.decompress(rest, CHUNK * 16)
            except zlib.error:
                yield Broken("gzip is damaged")
                return
            rest = member.unconsumed_tail
            if member.eof:
                rest, member, begun = member.unused_data, zlib.decompressobj(wbits=31), False
    if begun:
        yield Broken("gzip ends too early")


def as_utf8(chunks: Iterator[bytes | Broken], encoding: str) -> Iterator[bytes | Broken]:
    """Bytes in UTF-8, without byte order mark; what cannot be decoded stays what no UTF-8 is."""
    first = b""
    for chunk in chunks:
        if isinstance(chunk, Broken):
            yield chunk
            return
        first += chunk
        if len(first) >= max(map(len, MARKS)):
            break
    mark = next((mark for mark in MARKS if first.startswith(mark)), b"")
    name = MARKS[mark] if mark else encoding
    if codecs.lookup(name).name == "utf-8":
        yield first[len(mark) :]
        yield from chunks
        return
    decoder = codecs.getincrementaldecoder(name)("surrogateescape")
    try:
        yield decoder.decode(first[len(mark) :]).encode(errors="surrogateescape")
        for chunk in chunks:
            yield chunk if isinstance(chunk, Broken) else decoder.decode(chunk).encode(errors="surrogateescape")
        yield decoder.decode(b"", final=True).encode(errors="surrogateescape")
    except UnicodeError as error:  # of UTF-16 and UTF-32, where no byte can stay what it is
        yield Broken(f"invalid {name}: {error}"[:EXCERPT_CHARACTERS])


def lines_of(file: Store, encoding: str, max_bytes: int) -> Iterator[bytes | Broken]:
    """The lines of a file in UTF-8, without their ends; one that is longer than `max_bytes` is broken."""
    begun, is_long = b"", False
    for chunk in as_utf8(chunks_of(file), encoding):
        if isinstance(chunk, Broken):
            yield chunk
            return
        *ended, rest = chunk.split(b"\n")
        for piece in ended:
            line = begun if is_long else begun + piece
            too_long = is_long or len(line) > max_bytes
            yield Broken(f"line of more than {max_bytes} bytes", line) if too_long else line.removesuffix(b"\r")
            begun, is_long = b"", False
        if not is_long:
            begun += rest
            is_long = len(begun) > max_bytes
            begun = begun[: EXCERPT_CHARACTERS * 4] if is_long else begun
    if is_long:
        yield Broken(f"line of more than {max_bytes} bytes", begun)
    elif begun:
        yield begun.removesuffix(b"\r")


def _decoded(line: bytes) -> str | None:
    try:
        return line.decode()
    except UnicodeDecodeError:
        return None


def _text_rows(file: Store, source: SourceConfig, max_bytes: int) -> Iterator[RawRow]:
    for line in lines_of(file, source.encoding, max_bytes):
        yield _text_row(line, source.lang)


def _text_row(line: bytes | Broken, lang: str | None) -> RawRow:
    if isinstance(line, Broken):
        return line.row
    text = _decoded(line)
    return Broken("invalid UTF-8", line).row if text is None else RawRow(text, lang)


def _moses_rows(file: Store, source: SourceConfig, max_bytes: int) -> Iterator[RawRow]:
    """Line by line the texts of two files; a line that one of them lacks is broken."""
    other = Store.at(source.translations or "")
    lefts = lines_of(file, source.encoding, max_bytes)
    rights = lines_of(other, source.encoding, max_bytes)
    while True:
        left, right = next(lefts, None), next(rights, None)
        if left is None and right is None:
            return
        if left is None or right is None:
            yield Broken(f"no line of {PurePosixPath((file if left is None else other).path).name} beside it").row
            continue
        rows = [_text_row(left, source.lang), _text_row(right, source.right_lang)]
        broken = next((row for row in rows if row.reason), None)
        yield broken or RawRow(rows[0].text, source.lang, rows[1].text, source.right_lang)


def _json_rows(file: Store, source: SourceConfig, max_bytes: int) -> Iterator[RawRow]:
    for line in lines_of(file, source.encoding, max_bytes):
        if isinstance(line, Broken):
            yield line.row
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield Broken("invalid UTF-8" if isinstance(error, UnicodeDecodeError) else "not JSON", line).row
            continue
        yield _record_row(record, source) if isinstance(record, dict) else Broken("no object", line).row


def _record_row(record: dict[str, Any], source: SourceConfig) -> RawRow:
    """A row of named values."""
    texts = []
    for name in (source.text, source.right):
        value = record.get(name) if name else None
        if name and name not in record:
            return Broken(f"no {name!r}", str(record).encode(errors="replace")).row
        if name and value is None:
            return Broken("null", str(record).encode(errors="replace")).row
        if name and not isinstance(value, str):
            return Broken(f"{name!r} is {type(value).__name__}", str(record).encode(errors="replace")).row
        texts.append(value)
    langs = [
        fixed or (str(record[column]) if record.get(column) else None)
        for fixed, column in ((source.lang, source.lang_column), (source.right_lang, source.right_lang_column))
    ]
    group = record.get(source.group) if source.group else None
    return RawRow(texts[0], langs[0], texts[1], langs[1], None if group is None else str(group))


def _csv_rows(file: Store, source: SourceConfig, max_bytes: int) -> Iterator[RawRow]:
    broken: list[Broken] = []

    def lines() -> Iterator[str]:
        for line in lines_of(file, source.encoding, max_bytes):
            if isinstance(line, Broken):
                broken.append(line)
            else:
                yield line.decode(errors="surrogateescape") + "\n"

    csv.field_size_limit(min(max_bytes, sys.maxsize))
    # In TSV a quote is a letter like any other: sentences begin with one.
    tabs: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    reader = csv.reader(lines(), **tabs if source.format_of(file) == "tsv" else {})
    names: list[str] | None = None
    while True:
        try:
            values = next(reader, None)
        except csv.Error as error:  # a quote that nothing closes, until the field is too long
            yield Broken(f"no CSV: {error}").row
            continue
        yield from (line.row for line in broken)
        broken.clear()
        if values is None:
            return
        if names is None:
            names = values
        elif values:
            yield _record_row(dict(zip(names, values, strict=False)), source)


def _catalogue_rows(file: Store, source: SourceConfig, max_bytes: int) -> Iterator[RawRow]:
    """The translated messages of a gettext catalogue, each beside its English."""
    content = _whole(file)
    if isinstance(content, Broken):
        yield content.row
        return
    lang = source.right_lang or language_of_path(file.path)
    try:
        if source.format_of(file) == "mo":
            messages = [(english_of_gettext_id(key), text) for key, text in read_gettext(content, str(file)).items()]
        else:
            catalogue = polib.pofile(content.removeprefix(codecs.BOM_UTF8).decode(charset_of(content)))
            lang = source.right_lang or _language_of_header(catalogue.metadata.get("Language", "")) or lang
            # Of plural forms the last, which is the general one.
            messages = [
                (entry.msgid_plural or entry.msgid, [entry.msgstr, *entry.msgstr_plural.values()][-1])
                for entry in catalogue.translated_entries()
            ]
    except (DataError, UnicodeDecodeError, OSError, ValueError) as error:
        yield Broken("no gettext catalogue", str(error).encode()).row
        return
    for english, text in messages:
        if text:
            yield RawRow(english, source.lang or "en", text, lang)


def _whole(file: Store) -> bytes | Broken:
    """All bytes of a file of which no part can be read by itself."""
    pieces: list[bytes] = []
    size = 0
    for chunk in chunks_of(file):
        if isinstance(chunk, Broken):
            return chunk
        size += len(chunk)
        if size > LARGEST_CATALOGUE:
            return Broken(f"catalogue of more than {LARGEST_CATALOGUE} bytes")
        pieces.append(chunk)
    return b"".join(pieces)


class Entry(NamedTuple):
    """A text of a catalogue."""

    key: str
    text: str
    lang: str | None
    is_title: bool = False
    """Whether what comes next is about it."""


def _keyed_rows(file: Store, source: SourceConfig, max_bytes: int) -> Iterator[RawRow]:
    """The texts of a catalogue: each beside its original, its English key or its title, or in the group of its key."""
    try:
        entries = list(_entries(file, source))
        originals = _originals(originals_of(file, source), source) if source.originals else None
    except (DataError, RecursionError, UnicodeDecodeError) as error:
        yield Broken(f"no {source.format}", str(error).encode()).row
        return
    if originals is not None:
        for entry in entries:
            if original := originals.get(entry.key):
                yield RawRow(original.text, original.lang, entry.text, source.lang or entry.lang)
    elif source.passages:
        for title, below in pairwise(entries):
            if title.is_title and not below.is_title:
                yield RawRow(title.text, source.lang or title.lang, below.text, source.lang or below.lang)
    else:
        for entry in entries:
            english = entry.key.partition("bundle.")[2] if source.format == "messages" else ""
            if " " in english:
                yield RawRow(english, "en", entry.text, source.lang or entry.lang)
            elif entry.text:
                yield RawRow(entry.text, source.lang or entry.lang, group=_group_of(file, source, entry.key))


_read_last: dict[tuple[str, Format | None, str], dict[str, Entry]] = {}


def _originals(file: Store, source: SourceConfig) -> dict[str, Entry]:
    """The texts of the file of originals by key, read once for all the files beside it that come next."""
    mark = str(file), source.format, str(file.info.mtime)
    if mark not in _read_last:
        _read_last.clear()
        _read_last[mark] = {entry.key: entry for entry in _entries(file, source)}
    return _read_last[mark]


def _group_of(file: Store, source: SourceConfig, key: str) -> str:
    """What a text shares with its translations; messages of other files may have the same keys.

    `menu/de.json` and `menu/en.json` are one catalogue, and so are `menu.de.json` and `menu.en.json`.
    """
    if source.format != "messages":
        return key
    path = PurePosixPath(file.path)
    translated = path.stem.rpartition(".")[0] or path.parent.name
    return f"{translated if language_of_path(file.path) else path.name}:{key}"


def _entries(file: Store, source: SourceConfig) -> Iterator[Entry]:
    """The texts of a catalogue with their keys, in order; DataError where it is none."""
    if source.format == "manual":
        if file.info.size > LARGEST_CATALOGUE:
            raise DataError(f"{file}: {file.info.size} bytes; expected at most {LARGEST_CATALOGUE}")
        for path, lang, texts in read_manual(io.BytesIO(file.read()), str(file)):
            known = canonical(lang) if lang else None
            for key, text in texts.items():
                yield Entry(f"{path}#{key}", text, known, key.startswith("hd_"))
        return
    content = _whole(file)
    if isinstance(content, Broken):
        raise DataError(f"{file}: {content.reason}")
    if source.format == "descriptions":
        lang = canonical(PurePosixPath(file.path).name.removeprefix("Translation-"))
        for mark, paragraphs in read_descriptions(content.decode().split("\n")):
            # Paragraphs are told apart by their number: where there are others, none is known to be the same.
            for number, text in enumerate(paragraphs):
                yield Entry(f"{mark}:{number}/{len(paragraphs)}" if number else mark, text, lang, not number)
        return
    for key, text in read_json(content, str(file)).items():
        yield Entry(key, text, language_of_path(file.path))


def _language_of_header(value: str) -> str | None:
    return canonical(value) if LOCALE.fullmatch(value) else None


def language_of_path(path: str) -> str | None:
    """The language of `…/de/LC_MESSAGES/x.mo`, `…/pt_BR.po` or `x.zh_CN.po`."""
    parts = PurePosixPath(path).parts
    if len(parts) > 2 and parts[-2] == "LC_MESSAGES":
        name = parts[-3]
    else:
        name = PurePosixPath(path.removesuffix(".gz")).stem.rpartition(".")[2]
    return canonical(name) if LOCALE.fullmatch(name) else None


def _tmx_rows(file: Store, source: SourceConfig, max_bytes: int) -> Iterator[RawRow]:
    """Every translation unit: its first language, or `source.lang`, beside each of the others."""
    parser: Any = ElementTree.XMLPullParser(["start", "end"])
    body: list[ElementTree.Element] = []
    pending = 0
    for chunk in chunks_of(file):
        if isinstance(chunk, Broken):
            yield chunk.row
            return
        pending += len(chunk)
        if pending > max_bytes + CHUNK * 16:
            yield Broken(f"translation unit of more than {max_bytes} bytes").row
            return
        try:
            parser.feed(chunk)
            for event, element in parser.read_events():
                if event == "start" and element.tag == "body":
                    body = [element]
                elif event == "end" and element.tag == "tu":
                    yield from _unit_rows(element, source)
                    pending = 0
                    for parent in body:
                        parent.clear()  # or all that was read would stay in memory
        except ElementTree.ParseError as error:
            yield Broken("no well-formed XML", str(error).encode()).row
            return
    try:
        parser.close()
    except ElementTree.ParseError as error:
        yield Broken("no well-formed XML", str(error).encode()).row


def _unit_rows(unit: ElementTree.Element, source: SourceConfig) -> Iterator[RawRow]:
    variants: list[tuple[str, str]] = []
    for variant in unit.iter("tuv"):
        lang = variant.get(XML_LANG) or variant.get("lang") or UNKNOWN_LANGUAGE
        segment = variant.find("seg")
        if segment is not None:
            variants.append((canonical(lang), "".join(segment.itertext())))
    left = next((variant for variant in variants if variant[0] == source.lang), variants[0] if variants else None)
    if left is None or len({lang for lang, _ in variants}) < 2:
        yield Broken("translation unit of fewer than two languages", str(variants).encode()).row
        return
    # One language may come twice, as pt-PT and pt-BR do.
    for lang, text in variants:
        if lang != left[0] and source.right_lang in (None, lang):
            yield RawRow(left[1], left[0], text, lang)


def convert(file: Store, source: SourceConfig, target: BinaryIO, max_line_bytes: int) -> None:
    """Write the rows of a file as Parquet of the schema RAW, so that each can be found by its number."""
    rows = read_rows(file, source, max_line_bytes)
    with pq.ParquetWriter(target, RAW, compression="zstd") as writer:
        while some := list(islice(rows, CONVERT_ROWS)):
            columns = zip(*some, strict=True)
            arrays = [pa.array(column, field.type) for column, field in zip(columns, RAW, strict=True)]
            writer.write_table(pa.Table.from_arrays(arrays, schema=RAW))


def read_raw(parquet: pq.ParquetFile, source: SourceConfig, groups: list[int], is_converted: bool) -> pa.Table:
    """Rows of a Parquet file in the schema RAW; those whose text is no text have a reason."""
    if is_converted:
        return parquet.read_row_groups(groups)
    wanted = {
        "text": source.text,
        "lang": source.lang_column,
        "right": source.right,
        "right_lang": source.right_lang_column,
        "group": source.group,
    }
    names = parquet.schema_arrow.names
    found = {name: column for name, column in wanted.items() if column in names}
    table = parquet.read_row_groups(groups, columns=list(dict.fromkeys(found.values())))
    columns = {name: table[column] for name, column in found.items()}
    problem = None
    for name in [name for name in ("text", "right") if wanted[name]]:
        kind = columns[name].type if name in columns else None
        if kind is None:
            problem = problem or f"no column {wanted[name]!r}"
        elif not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            problem = problem or f"column {wanted[name]!r} is {kind}"
            del columns[name]
    for name in ("lang", "right_lang", "group"):
        if name in columns and pa.types.is_nested(kind := columns[name].type):
            problem = problem or f"column {wanted[name]!r} is {kind}"
            del columns[name]
    if "group" in columns and pa.types.is_integer(columns["group"].type):
        # What a corpus of our own says where no translation is known.
        columns["group"] = pc.if_else(pc.equal(columns["group"], -1), None, columns["group"])
    fixed = {"lang": source.lang, "right_lang": source.right_lang}
    columns |= {name: pa.array([lang] * len(table)) for name, lang in fixed.items() if lang}
    return _checked(columns, len(table), problem)


def _checked(columns: dict[str, Any], num_rows: int, problem: str | None) -> pa.Table:
    """The columns as RAW; with a `problem` that the whole file has, no row of it is one."""
    reason = pa.array([problem] * num_rows, pa.string())
    arrays: dict[str, Any] = {}
    for field in RAW:
        if field.name == "reason":
            continue
        column = columns.get(field.name, pa.nulls(num_rows, field.type))
        if field.name in ("text", "right") and field.name in columns:
            column, reason = _decodable(pa.chunked_array([column]) if isinstance(column, pa.Array) else column, reason)
        arrays[field.name] = column.cast(field.type)
    return pa.table([*arrays.values(), reason], schema=RAW)


def _decodable(column: pa.ChunkedArray, reason: pa.Array) -> tuple[pa.Array, pa.Array]:
    """A column of texts without those that are none, and the reasons, these added."""
    try:
        column.validate(full=True)
        if not pc.any(pc.match_substring(column, "\0")).as_py() and not column.null_count:
            return column, reason
    except pa.ArrowInvalid:
        pass  # bytes that are no UTF-8: told row by row
    texts, reasons = [], []
    contents = column.cast(pa.large_binary()).to_pylist()
    for content, before in zip(contents, reason.to_pylist(), strict=True):
        text = None if content is None else _decoded(content)
        why = before or (
            "null" if content is None else "invalid UTF-8" if text is None else "NUL" if "\0" in text else None
        )
        texts.append(Broken(why, content or b"").row.text if why else text)
        reasons.append(why)
    return pa.chunked_array([pa.array(texts, pa.large_string())]), pa.array(reasons, pa.string())
