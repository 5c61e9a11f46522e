"""A directory of numbered parts that belongs to one piece of work: what is finished stays, what is missing is made."""

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from embedlib.artifact import MANIFEST_NAME, Manifest, hash_file, parse_manifest
from embedlib.errors import ArtifactError, DataError
from embedlib.storage import Store

CLAIM = ".fingerprint"
"""In a directory that is taken: the fingerprint of the work that took it."""
# Byte streams of like significance compress; integers and signs are noise to any encoding.
SPLIT_BYTES = (pa.float16(), pa.float32())


def part_name(number: int, kind: str = "parquet") -> str:
    """The file of part number `number`, of the kind that its ending names."""
    return f"part-{number:06}.{kind}"


def missing_parts(directory: Store, num_parts: int, kind: str = "parquet") -> list[int]:
    """Numbers of the parts that are not there yet."""
    there = {file.path.rsplit("/", 1)[-1] for file in directory.files()}
    return [number for number in range(num_parts) if part_name(number, kind) not in there]


def is_part(file: Store) -> bool:
    """Whether a file is a finished part of some work."""
    return file.path.rsplit("/", 1)[-1].startswith("part-")


def write_parquet(path: Store, table: pa.Table) -> None:
    """Write a table as one file that appears whole."""
    encodings: dict[str, str] = {}
    if "vector" in table.column_names and table.schema.field("vector").type.value_type in SPLIT_BYTES:
        encodings["vector.list.element"] = "BYTE_STREAM_SPLIT"
    if "id" in table.column_names and pa.types.is_integer(table.schema.field("id").type):
        encodings["id"] = "DELTA_BINARY_PACKED"
    plain = [name for name in table.column_names if name not in ("id", "vector")]
    # Least and greatest of every element of a vector, or a list, tell nothing and take a third of the time.
    described = [name for name in table.column_names if name != "vector"]
    buffer = io.BytesIO()
    pq.write_table(
        table, buffer, compression="zstd", use_dictionary=plain, column_encoding=encodings, write_statistics=described
    )
    path.write(buffer.getbuffer())


def content_mark(file: Store) -> list[Any]:
    """What tells one content of an input file from another: its hash, in an object store its size and time."""
    if not file.exists():
        raise DataError(f"{file}: no such file")
    return [hash_file(Path(file.path))] if file.is_local else [file.path, file.info.size, file.info.mtime_ns]


def claim(directory: Store, mark: str, what: str, gives_way: bool = False) -> Manifest | None:
    """Take `directory` for the work with fingerprint `mark`; ArtifactError where other work has taken it.

    Gives the manifest where the work, which makes `what`, is finished. With `gives_way`, work that has not finished a
    part gives way to other settings: a run may end before, and ask for them.
    """
    note, path = directory / CLAIM, directory / MANIFEST_NAME
    manifest = parse_manifest(path.read(), str(path)) if path.exists() else None
    holder = manifest.fingerprint if manifest else note.read().decode() if note.exists() else mark
    if holder != mark and gives_way and not manifest and not any(map(is_part, directory.files())):
        note.write(mark.encode())
    elif holder != mark:
        raise ArtifactError(
            f"{directory}: holds {what} {holder[:12]}, but this run makes {mark[:12]}; "
            "move it away or choose another output"
        )
    if not note.exists():
        note.write(mark.encode())
    return manifest
