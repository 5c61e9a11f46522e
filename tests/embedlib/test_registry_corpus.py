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
from embedlib.registry_corpus import Package, fetch, located, unpack
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
    assert unpack(tmp_path / "archive", ["*.po"], tmp_path / "none") == 0


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
    directory = located(package, tmp_path / "cache", 0)
    assert (directory / "package" / "a.json").read_bytes() == b"{}"
    assert located(package, tmp_path / "cache", 0) == directory
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
    assert [row.reason for row in read_rows(Store.at(str(path)), source, 1000)] == ["no messages"]


APT = """#!/bin/sh
echo "$1" >> {folder}/calls
for word in "$@"; do case "$word" in
  Dir::State::Lists=*) lists="${{word#*=}}";;
  Acquire::Languages=*) languages="${{word#*=}}";;
esac; done
[ "$1" = update ] || {{ cp {folder}/a.deb .; exit; }}
for lang in $(echo "$languages" | tr , ' '); do
  [ "$lang" = none ] || cp {folder}/Translation-"$lang" "$lists"/mirror_main_i18n_Translation-"$lang" || exit 1
done
"""
ENGLISH = """\
Package: a
Description-md5: 111
Description-en: draws circles
 It draws circles on
 the screen. Features:
  * red ones
    and blue ones
  * squares
 .
 The end.

Package: b
Description-md5: 222
Description-en: sings
 One paragraph.
"""
GERMAN = """\
Package: a
Description-md5: 111
Description-de: zeichnet Kreise
 Es zeichnet Kreise. Merkmale:
  * rote und blaue
  * Quadrate
 .
 Ende.

Package: b
Description-md5: 222
Description-de: singt
 Ein Absatz.
 .
 Und noch einer.

Package: c
Description-md5: 333
Description-de: unbekannt
"""


@pytest.fixture
def apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with what a program called apt-get downloads."""
    program = tmp_path / "bin" / "apt-get"
    program.parent.mkdir()
    program.write_text(APT.format(folder=tmp_path))
    program.chmod(0o755)
    (tmp_path / "Translation-en").write_text(ENGLISH)
    (tmp_path / "Translation-de").write_text(GERMAN)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    return tmp_path


def test_descriptions_of_debian_lie_beside_their_english(apt: Path) -> None:
    package = Package(name="descriptions", registry="debian-descriptions", requirement="en,de")
    directory = located(package, apt / "cache", 0)
    assert located(package, apt / "cache", 0) == directory
    assert (apt / "calls").read_text() == "update\n"
    german, english = str(directory / "Translation-de"), str(directory / "Translation-en")
    pairs = SourceConfig(name="s", path=german, format="descriptions", originals=english)
    assert list(read_rows(Store.at(german), pairs, 1000)) == [
        RawRow("draws circles", "en", "zeichnet Kreise", "de"),
        RawRow("It draws circles on the screen. Features:", "en", "Es zeichnet Kreise. Merkmale:", "de"),
        RawRow("red ones and blue ones", "en", "rote und blaue", "de"),
        RawRow("squares", "en", "Quadrate", "de"),
        RawRow("The end.", "en", "Ende.", "de"),
        RawRow("sings", "en", "singt", "de"),  # of another number of paragraphs
    ]
    passages = SourceConfig(name="s", path=english, format="descriptions", passages=True)
    assert list(read_rows(Store.at(english), passages, 1000)) == [
        RawRow("draws circles", "en", "It draws circles on the screen. Features:", "en"),
        RawRow("sings", "en", "One paragraph.", "en"),
    ]
    texts = SourceConfig(name="s", path=german, format="descriptions")
    assert [row.group for row in read_rows(Store.at(german), texts, 1000)][:2] == ["111", "111:1/5"]
    with pytest.raises(ArtifactError, match="apt-get could not download it"):
        located(package.model_copy(update={"requirement": "en,xx"}), apt / "cache", 0)


def test_an_archive_is_verified_and_left_as_it_is(apt: Path) -> None:
    packed = debian(FILES)
    (apt / "a.deb").write_bytes(packed)
    values = {"name": "a", "registry": "debian", "requirement": "a==1"}
    package = Package.model_validate(values | {"sha256": hashlib.sha256(packed).hexdigest()})
    assert located(package, apt / "cache", 0).read_bytes() == packed
    with pytest.raises(ValueError, match="sha256: None for 'a==1'; expected one for what has a version"):
        Package.model_validate(values)


def test_packages_that_debian_has_now_are_fetched_once(apt: Path) -> None:
    (apt / "a.deb").write_bytes(debian(FILES))
    package = Package(name="a", registry="debian", requirement="a,b", members=["*.mo"])
    directory = located(package, apt / "cache", 0)
    assert located(package, apt / "cache", 0) == directory
    assert (apt / "calls").read_text() == "update\ndownload\ndownload\n"
    assert [path.name for path in directory.rglob("*") if path.is_file()] == ["a.mo"]
    whole = located(package.model_copy(update={"members": []}), apt / "cache", 0)
    assert [path.name for path in whole.iterdir()] == ["a.deb"]
    with pytest.raises(ArtifactError, match=r"a,b: no member matches \['\*\.po'\]"):
        located(package.model_copy(update={"members": ["*.po"]}), apt / "cache", 0)


PAGE = """<html lang="{lang}"><body><h1 id="hd_1">{title}</h1><p>no id</p>
<p id="par_1">{begin} <b>bold</b> &amp;
end.</p><p id="par_2"></p></body></html>"""


def test_paragraphs_of_a_manual_lie_beside_those_of_the_same_id(tmp_path: Path) -> None:
    for lang, title, begin in (("en-US", "Circles", "Draw"), ("hi", "वृत्त", "बनाएँ")):
        page = PAGE.format(lang=lang, title=title, begin=begin).encode()
        pages = {f"usr/share/help/{lang}/a.html": page, f"usr/share/help/{lang}/b/c.html": page.replace(b"par_", b"q_")}
        (tmp_path / f"{lang}.deb").write_bytes(debian(pages | {"usr/share/other": b""}))
    english, hindi = str(tmp_path / "en-US.deb"), str(tmp_path / "hi.deb")
    rows = list(read_rows(Store.at(hindi), SourceConfig(name="s", path=hindi, format="manual", originals=english), 100))
    assert (
        rows
        == [
            RawRow("Circles", "en", "वृत्त", "hi"),
            RawRow("Draw bold & end.", "en", "बनाएँ bold & end.", "hi"),
        ]
        * 2
    )
    passages = SourceConfig(name="s", path=english, format="manual", passages=True)
    assert list(read_rows(Store.at(english), passages, 100)) == [RawRow("Circles", "en", "Draw bold & end.", "en")] * 2
    for broken in (b"!<arch>\n", b"PK\x03\x04", debian(FILES)[:200], b""):
        (tmp_path / "hi.deb").write_bytes(broken)
        assert [row.reason for row in read_rows(Store.at(hindi), passages, 100)] == ["no manual"]


@pytest.mark.parametrize("names", [("menu/de.json", "menu/en.json"), ("menu.de.json", "menu.en.json")])
def test_messages_of_one_catalogue_are_in_one_group(tmp_path: Path, names: tuple[str, str]) -> None:
    groups = []
    for name, text in zip(names, ("Hallo", "Hello"), strict=True):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"a": text}))
        (row,) = read_rows(Store.at(str(path)), SourceConfig(name="s", path=str(path), format="messages"), 100)
        groups.append(row.group)
    assert groups == ["menu:a", "menu:a"]


def test_messages_lie_beside_those_of_the_same_key(tmp_path: Path) -> None:
    (tmp_path / "de.json").write_text(json.dumps({"a": {"b": "Hallo"}, "c": "Neu"}))
    (tmp_path / "en.json").write_text(json.dumps({"a": {"b": "Hello"}}))
    source = SourceConfig(name="s", path=str(tmp_path / "de.json"), format="messages", originals=f"{tmp_path}/en.json")
    expected = [RawRow("Hello", "en", "Hallo", "de")]
    assert list(read_rows(Store.at(source.path), source, 100)) == expected
    beside = source.model_copy(update={"originals": "en.json"})
    assert list(read_rows(Store.at(source.path), beside, 100)) == expected
    missing = source.model_copy(update={"originals": "fr.json"})
    assert [row.reason for row in read_rows(Store.at(source.path), missing, 100)] == ["no messages"]
    for values, problem in (
        ({"format": "po", "originals": "en.po"}, "originals: with format po; expected one of messages"),
        ({"format": "messages", "passages": True}, "passages: expected format descriptions or manual"),
    ):
        with pytest.raises(ValueError, match=problem):
            SourceConfig.model_validate({"name": "s", "path": "x"} | values)
