"""Catalogues of translated texts: compiled gettext files, JSON, descriptions of Debian's packages, manuals in HTML."""

import codecs
import json
import re
import struct
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from os.path import commonpath
from typing import Any, BinaryIO

from embedlib.archives import members_of
from embedlib.errors import DataError

PARAGRAPHS = {"p", "li", "dt", "dd", "td", "th", "caption", "h1", "h2", "h3", "h4", "h5", "h6"}
CHARSET = re.compile(rb"Content-Type:[^\n]*charset=([\w.:-]+)")
BULLET = re.compile(r"\s+[*\-+o•·]\s+")


def read_gettext(content: bytes, path: str) -> dict[str, str]:
    """Message id → translation of a compiled gettext catalogue (.mo); of plural forms the last and general one.

    Raises DataError where the bytes are no such catalogue.
    """
    order = {b"\xde\x12\x04\x95": "<", b"\x95\x04\x12\xde": ">"}.get(content[:4])
    if order is None:
        raise DataError(
            f"{path}: starts with {content[:4]!r}; expected the magic number of a compiled gettext catalogue"
        )
    try:
        count, ids_at, texts_at = struct.unpack_from(order + "3I", content, 8)
        ids = struct.unpack_from(f"{order}{2 * count}I", content, ids_at)
        texts = struct.unpack_from(f"{order}{2 * count}I", content, texts_at)
        places = list(zip(ids[::2], ids[1::2], texts[::2], texts[1::2], strict=True))
        # The translation of nothing is the catalogue's header.
        encoding = charset_of(next((content[at : at + length] for size, _, length, at in places if not size), b""))
        return {
            content[id_at : id_at + id_length].decode(encoding): content[at : at + length]
            .decode(encoding)
            .rpartition("\0")[2]
            for id_length, id_at, length, at in places
            if id_length
        }
    except (struct.error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a readable gettext catalogue: {error}") from error


def charset_of(header: bytes) -> str:
    """The encoding that the header of a gettext catalogue names; UTF-8 where it names none, as templates do."""
    found = CHARSET.search(header)
    try:
        return codecs.lookup(found[1].decode()).name if found else "utf-8"
    except LookupError:
        return "utf-8"


def english_of_gettext_id(message_id: str) -> str:
    r"""The English text in a gettext message id: without its context, and of plural forms the last.

    >>> english_of_gettext_id("menu\x04%d file\0%d files")
    '%d files'
    """
    return message_id.rpartition("\x04")[2].rpartition("\0")[2]


def read_json(content: bytes, path: str) -> dict[str, str]:
    """Dotted key → text of a JSON catalogue, however deeply its objects are nested; DataError where it is not JSON."""
    try:
        catalogue = json.loads(content)
    except ValueError as error:
        raise DataError(f"{path}: not a JSON catalogue: {error}") from error
    return dict(_flatten(catalogue, ""))


def _flatten(node: Any, prefix: str) -> Iterator[tuple[str, str]]:
    """The texts below a JSON object with their dotted keys."""
    if isinstance(node, str):
        yield prefix, node
    elif isinstance(node, dict):
        for key, child in node.items():
            yield from _flatten(child, f"{prefix}.{key}" if prefix else key)


def read_descriptions(lines: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """Each description in an index of Debian's archive: the hash of its original, and title and paragraphs.

    `lines` are those of a Translation-xx file. The items of a list are paragraphs, too.
    """
    mark, is_open = "", False
    paragraphs: list[str] = []
    for line in lines:
        if not line.startswith(" "):
            if paragraphs:
                yield mark, paragraphs
            name, _, value = line.partition(":")
            if name == "Description-md5":
                mark = value.strip()
            paragraphs = [value.strip()] if name.startswith("Description-") and name != "Description-md5" else []
            is_open = False
        elif paragraphs and line.strip() == ".":
            is_open = False
        elif paragraphs:
            bullet = BULLET.match(line)
            if bullet or not is_open:
                paragraphs.append(line[bullet.end() if bullet else 0 :].strip())
            else:
                paragraphs[-1] += " " + line.strip()
            is_open = True
    if paragraphs:
        yield mark, paragraphs


class Page(HTMLParser):
    """The paragraphs of a page that have an id, and its language."""

    def __init__(self) -> None:
        super().__init__()
        self.lang: str | None = None
        self.paragraphs: dict[str, str] = {}
        self.tag, self.id = "", ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """Begin a paragraph."""
        values = dict(attributes)
        if tag == "html":
            self.lang = values.get("lang")
        if tag in PARAGRAPHS:
            self.tag, self.id = tag, values.get("id") or ""
            if self.id:
                self.paragraphs[self.id] = ""

    def handle_endtag(self, tag: str) -> None:
        """End it."""
        if tag == self.tag:
            self.tag, self.id = "", ""

    def handle_data(self, data: str) -> None:
        """Text of it, whatever stands around it."""
        if self.id:
            self.paragraphs[self.id] += data


def read_manual(archive: BinaryIO, name: str) -> Iterator[tuple[str, str | None, dict[str, str]]]:
    """The pages of a manual in an archive: path below what all have in common, language, and texts by id.

    Raises DataError where it is no archive.
    """
    members = ((path.lstrip("/"), content) for path, content in members_of(archive, name))
    pages = [(path, content) for path, content in members if path.endswith((".html", ".htm"))]
    common = commonpath([path for path, _ in pages]) if len(pages) > 1 else ""
    for path, content in sorted(pages):
        page = Page()
        page.feed(content.decode(errors="replace"))
        page.close()
        texts = {key: " ".join(text.split()) for key, text in page.paragraphs.items()}
        yield path.removeprefix(common), page.lang, {key: text for key, text in texts.items() if text}
