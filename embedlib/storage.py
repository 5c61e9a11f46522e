"""Files on this machine or in an object store, through pyarrow; what is written appears at once and whole."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import pyarrow as pa
from pyarrow import fs
from pydantic import AfterValidator

from embedlib.errors import ArtifactError, DataError


def user_directory() -> Path:
    """Where the user typed the command: a submitted job runs in a copy of the checkout."""
    return Path(os.environ.get("EMBEDLIB_CWD", ".")).absolute()


def user_path(path: str) -> str:
    """`path` as the user meant it: a URI as it is, a relative path from where the command was typed."""
    return path if "://" in path else str(user_directory() / Path(path).expanduser())


def user_model(name: str) -> str:
    """A model as the user meant it: a directory from where the command was typed, if there is one; else as it is.

    `DIR@128` is a directory as well: its vectors are to be cut.
    """
    directory, at, dimensions = name.partition("@")
    return f"{user_path(directory)}{at}{dimensions}" if Path(user_path(directory)).is_dir() else name


UserPath = Annotated[str, AfterValidator(user_path)]
UserModel = Annotated[str, AfterValidator(user_model)]


class Store(NamedTuple):
    """A directory, or a file, on some filesystem."""

    filesystem: fs.FileSystem
    path: str

    @classmethod
    def at(cls, uri: str) -> "Store":
        """What `uri` names: a path of this machine, or s3://, gs://, hdfs:// and the like."""
        if "://" not in uri:
            return cls(fs.LocalFileSystem(), str(Path(uri).expanduser().absolute()))
        try:
            return cls(*fs.FileSystem.from_uri(uri))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
            raise DataError(f"{uri}: no filesystem that pyarrow can open: {error}") from error

    def __truediv__(self, name: str) -> "Store":
        return Store(self.filesystem, f"{self.path.rstrip('/')}/{name}")

    def __str__(self) -> str:
        return self.path if self.is_local else f"{self.filesystem.type_name}://{self.path}"

    @property
    def is_local(self) -> bool:
        """Whether it lies on this machine, or on what is mounted here."""
        return isinstance(self.filesystem, fs.LocalFileSystem)

    @property
    def info(self) -> fs.FileInfo:
        """Kind, size and time of the last change."""
        return self.filesystem.get_file_info(self.path)

    def exists(self) -> bool:
        """Whether there is a file or a directory."""
        return bool(self.info.type != fs.FileType.NotFound)

    def entries(self, recursive: bool = False) -> list[fs.FileInfo]:
        """All that lies in this directory in the order of its names, hidden files and directories, too."""
        selector = fs.FileSelector(self.path, recursive=recursive, allow_not_found=True)
        return sorted(self.filesystem.get_file_info(selector), key=lambda info: info.path)

    def files(self, recursive: bool = False) -> list["Store"]:
        """The files below this directory in the order of their names; hidden ones and scratch files are left out."""
        return [
            Store(self.filesystem, info.path)
            for info in self.entries(recursive)
            if info.type == fs.FileType.File and not info.base_name.startswith((".", "_"))
        ]

    def walk(self, is_entered: "Callable[[str], bool]") -> "Iterator[tuple[Store, dict[str, fs.FileInfo]]]":
        """This directory and those below it that `is_entered` by their names, each with its files by name."""
        found = self.entries()
        yield self, {info.base_name: info for info in found if info.type == fs.FileType.File}
        for info in found:
            if info.type == fs.FileType.Directory and is_entered(info.base_name):
                yield from Store(self.filesystem, info.path).walk(is_entered)

    def read(self) -> bytes:
        """The whole file."""
        with self.filesystem.open_input_stream(self.path) as stream:
            return bytes(stream.read())

    def write(self, content: "bytes | memoryview[int]") -> None:
        """Put a file here that others see whole or not at all; ArtifactError where the store refuses."""
        self._write_blocks(iter([content]))

    def _write_blocks(self, blocks: "Iterator[bytes | memoryview[int]]") -> None:
        parent, name = self.path.rsplit("/", 1)
        # An object appears when its upload ends; a file of a disk grows, so it gets its name when it is whole.
        scratch = f"{parent}/.{name}.{os.getpid()}" if self.is_local else self.path
        try:
            self.filesystem.create_dir(parent, recursive=True)
            with self.filesystem.open_output_stream(scratch) as stream:
                for block in blocks:
                    stream.write(block)
            if scratch != self.path:
                self.filesystem.move(scratch, self.path)
        except OSError as error:
            if scratch != self.path and self.filesystem.get_file_info(scratch).type == fs.FileType.File:
                self.filesystem.delete_file(scratch)
            raise ArtifactError(f"{self}: could not be written: {error}") from error

    def put(self, local: Path) -> None:
        """Put a file of this machine here, as `write` puts its content, without holding it in memory."""
        with local.open("rb") as content:
            self._write_blocks(iter(lambda: content.read(1 << 22), b""))

    def read_json(self) -> Any:
        """The value of a JSON file, None where there is no file."""
        return json.loads(self.read()) if self.exists() else None

    def write_json(self, value: Any) -> None:
        """Write `value` as JSON."""
        self.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())
