import hashlib
import subprocess
from pathlib import Path

import pytest

from embedlib.errors import ArtifactError
from embedlib.wheels import Wheel, cache_directory, fetch_wheel

CONTENT = b"a wheel"
WHEEL = Wheel(requirement="thing==1.0", sha256=hashlib.sha256(CONTENT).hexdigest())


class Pip:
    """Stands in for `pip download`: puts `content` where `--dest` says."""

    def __init__(self, content: bytes | None) -> None:
        self.content = content
        self.commands: list[list[str]] = []

    def __call__(self, command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        if self.content is None:
            return subprocess.CompletedProcess(command, 1, "", "ERROR: No matching distribution found")
        (Path(command[command.index("--dest") + 1]) / "thing-1.0-py3-none-any.whl").write_bytes(self.content)
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> Pip:
    stand_in = Pip(CONTENT)
    monkeypatch.setattr(subprocess, "run", stand_in)
    return stand_in


def test_a_wheel_is_downloaded_once(tmp_path: Path, pip: Pip) -> None:
    stored = fetch_wheel(WHEEL, tmp_path)
    assert stored.read_bytes() == CONTENT
    assert fetch_wheel(WHEEL, tmp_path) == stored
    assert len(pip.commands) == 1
    assert pip.commands[0][-1] == "thing==1.0"
    assert "--no-deps" in pip.commands[0]


def test_another_hash_is_refused_and_not_kept(tmp_path: Path, pip: Pip) -> None:
    pip.content = b"another wheel"
    with pytest.raises(ArtifactError, match=rf"thing==1\.0: wheel has SHA-256 \w+; expected {WHEEL.sha256}"):
        fetch_wheel(WHEEL, tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_damaged_file_in_the_cache_is_fetched_again(tmp_path: Path, pip: Pip) -> None:
    stored = fetch_wheel(WHEEL, tmp_path)
    stored.write_bytes(CONTENT[:3])
    assert fetch_wheel(WHEEL, tmp_path).read_bytes() == CONTENT
    assert len(pip.commands) == 2


def test_what_pip_says_is_told(tmp_path: Path, pip: Pip) -> None:
    pip.content = None
    with pytest.raises(ArtifactError, match="pip could not download it: ERROR: No matching distribution"):
        fetch_wheel(WHEEL, tmp_path)


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EMBEDLIB_CACHE", str(tmp_path))
    assert cache_directory() == tmp_path
    monkeypatch.delenv("EMBEDLIB_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "embedlib"
