"""Archives of package registries: verified, unpacked as far as asked for, and nothing beyond."""

import hashlib
import io
import json
import tarfile
import zipfile
from pathlib import Path

import pytest

from embedlib.errors import ArtifactError
from embedlib.reading import RawRow, SourceConfig, read_rows
from embedlib.registry_corpus import Package, fetch, unpack, unpacked
from embedlib.storage import Store

FILES = {"usr/share/locale/de/LC_MESSAGES/a.mo": b"catalogue", "usr/share/doc/readme": b"text"}


def tarball(files: dict[str, bytes], mode: str = "w:xz") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def debian(files: dict[str, bytes]) -> bytes:
    members = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": tarball(files)}
    archive = b"!<arch>\n"
    for name, content in members.items():
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode()
        archive += header + content + b"\n" * (len(content) % 2)
    return archive


def wheel(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


@pytest.mark.parametrize("packed", [debian(FILES), tarball(FILES, "w:gz"), wheel(FILES)], ids=["deb", "tgz", "whl"])
def test_what_matches_is_unpacked(tmp_path: Path, packed: bytes) -> None:
    (tmp_path / "archive").write_bytes(packed)
    assert unpack(tmp_path / "archive", ["*/LC_MESSAGES/*.mo"], tmp_path / "out") == 1
    found = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert [(str(path.relative_to(tmp_path / "out")), path.read_bytes()) for path in found] == [*FILES.items()][:1]
    with pytest.raises(ArtifactError, match=r"no member matches \['\*\.po'\]"):
        unpack(tmp_path / "archive", ["*.po"], tmp_path / "none")


def test_no_member_leaves_its_directory(tmp_path: Path) -> None:
    (tmp_path / "archive").write_bytes(tarball({"../../evil.mo": b"x"}, "w:gz"))
    with pytest.raises(ArtifactError, match="leaves its directory"):
        unpack(tmp_path / "archive", ["*.mo"], tmp_path / "out")


def test_a_package_is_fetched_once_and_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = tarball({"package/a.json": b"{}"}, "w:gz")
    program = tmp_path / "bin" / "npm"
    program.parent.mkdir()
    (tmp_path / "source.tgz").write_bytes(packed)
    program.write_text(f'#!/bin/sh\necho called >> {tmp_path}/calls\ncp {tmp_path}/source.tgz "$4"/a.tgz\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    values = {"name": "a", "registry": "npm", "requirement": "a@1", "members": ["*.json"]}
    package = Package.model_validate(values | {"sha256": hashlib.sha256(packed).hexdigest()})
    directory = unpacked(package, tmp_path / "cache", 0)
    assert (directory / "package" / "a.json").read_bytes() == b"{}"
    assert unpacked(package, tmp_path / "cache", 0) == directory
    assert fetch(package, tmp_path / "cache", 0).read_bytes() == packed
    assert (tmp_path / "calls").read_text() == "called\n"
    foreign = package.model_copy(update={"sha256": "0" * 64})
    with pytest.raises(ArtifactError, match=f"archive has SHA-256 {package.sha256}; expected 0000"):
        fetch(foreign, tmp_path / "cache", 0)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ArtifactError, match="npm is not installed"):
        fetch(foreign, tmp_path / "cache", 0)


def test_messages_lie_beside_their_english_or_in_their_group(tmp_path: Path) -> None:
    path = tmp_path / "git.i18n.json"
    contents = {"contents": {"bundle": {"Open the file": "Datei öffnen", "OK": "OK"}, "package": {"name": "Git"}}}
    path.write_text(json.dumps(contents))
    source = SourceConfig(name="s", path=str(path), format="messages", lang="de")
    assert list(read_rows(Store.at(str(path)), source, 1000)) == [
        RawRow("Open the file", "en", "Datei öffnen", "de"),
        RawRow("OK", "de", group="git.i18n.json:contents.bundle.OK"),
        RawRow("Git", "de", group="git.i18n.json:contents.package.name"),
    ]
    path.write_text("{")
    assert [row.reason for row in read_rows(Store.at(str(path)), source, 1000)] == ["not JSON"]
