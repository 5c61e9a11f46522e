"""What package registries ship as one file: wheels, npm tarballs, Debian packages."""

import io
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from embedlib.errors import DataError

# RuntimeError: a member is encrypted; NotImplementedError: packed in a way that Python does not know.
UNREADABLE = (
    *(tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError),
    *(OSError, ValueError, EOFError, RuntimeError, NotImplementedError),
)
# Nothing that is text is larger.
LARGEST_MEMBER = 1 << 26


def members_of(archive: BinaryIO, name: str) -> Iterator[tuple[str, bytes]]:
    """The files in a wheel, an npm tarball or a Debian package, by name.

    Links are no files, and what is too large for text is left out. Raises DataError, with the archive's `name`, where
    it cannot be read.
    """
    magic = archive.read(8)
    archive.seek(0)
    try:
        if magic.startswith(b"PK"):
            with zipfile.ZipFile(archive) as wheel:
                found = (info for info in wheel.infolist() if not info.is_dir() and info.file_size <= LARGEST_MEMBER)
                yield from ((info.filename, wheel.read(info)) for info in found)
        elif magic == b"!<arch>\n":
            yield from _debian_members(archive)
        else:
            with tarfile.open(fileobj=archive) as tarball:
                yield from _tar_members(tarball)
    except UNREADABLE as error:
        raise DataError(f"{name}: no archive that Python can read: {error}") from error


def _tar_members(tarball: tarfile.TarFile) -> Iterator[tuple[str, bytes]]:
    for member in tarball:
        content = tarball.extractfile(member) if member.isfile() and member.size <= LARGEST_MEMBER else None
        if content is not None:
            yield member.name.removeprefix("./"), content.read()


def _debian_members(archive: BinaryIO) -> Iterator[tuple[str, bytes]]:
    """The files of data.tar in an ar archive, each of whose members has a header of 60 bytes."""
    archive.seek(8)
    while header := archive.read(60):
        name, size = header[:16].decode().strip().rstrip("/"), int(header[48:58])
        if not name.startswith("data.tar"):
            archive.seek(size + size % 2, 1)
            continue
        with tarfile.open(fileobj=io.BytesIO(archive.read(size))) as tarball:
            yield from _tar_members(tarball)
        return
    raise ValueError("no data.tar in it; expected a Debian package")
