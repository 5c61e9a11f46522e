"""Catalogues of translated messages: compiled gettext files, and JSON."""

import json
import struct
from collections.abc import Iterator
from typing import Any

from embedlib.errors import DataError


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
        return {
            content[id_at : id_at + id_length].decode(): content[at : at + length].decode().rpartition("\0")[2]
            for id_length, id_at, length, at in zip(ids[::2], ids[1::2], texts[::2], texts[1::2], strict=True)
            if id_length
        }
    except (struct.error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a readable gettext catalogue: {error}") from error


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
