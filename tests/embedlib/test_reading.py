"""Files of every kind, whole and broken: each row is read or told why not, and no line is held for long."""

import gzip
import io
import json
import tracemalloc
from pathlib import Path

import polib
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from embedlib.errors import DataError
from embedlib.reading import RAW, RawRow, SourceConfig, convert, lines_of, read_raw, read_rows, source_files
from embedlib.storage import Store

LIMIT = 1 << 16
PO = """
msgid ""
msgstr ""
"Language: pt_BR\\n"
"Content-Type: text/plain; charset=UTF-8\\n"

msgctxt "menu"
msgid "Open the file"
msgstr "Abrir o arquivo"

#, fuzzy
msgid "Close"
msgstr "Abrir"

msgid "one file"
msgid_plural "many files"
msgstr[0] "um arquivo"
msgstr[1] "muitos arquivos"

msgid "Not translated"
msgstr ""

#~ msgid "Old"
#~ msgstr "Velho"
"""
TMX = """<?xml version="1.0"?>
<!DOCTYPE tmx SYSTEM "tmx14.dtd">
<tmx version="1.4"><header srclang="en"/><body>
<tu><tuv xml:lang="en-US"><seg>Good <bpt i="1">b</bpt>day</seg></tuv><tuv xml:lang="de"><seg>Guten Tag</seg></tuv>
<tuv xml:lang="fr"><seg>Bonjour</seg></tuv></tu>
<tu><tuv xml:lang="en"><seg>Alone</seg></tuv></tu>
</body></tmx>"""


def rows(path: Path, limit: int = LIMIT, **values: object) -> list[RawRow]:
    source = SourceConfig.model_validate({"name": "s", "path": str(path)} | values)
    return [row for file in source_files(source) for row in read_rows(file, source, limit)]


def told(found: list[RawRow]) -> list[tuple[str | None, str | None]]:
    return [(None if row.reason else row.text, row.reason) for row in found]


def test_lines_of_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\ntwo \xe4\xf6\nthr\x00ee\nfour")
    assert told(rows(path)) == [("one", None), ("", None), (None, "invalid UTF-8"), (None, "NUL"), ("four", None)]
    assert rows(path, lang="de")[0].lang == "de"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
def test_a_byte_order_mark_says_how_to_read(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("schön\n日本\n😀".encode(encoding))
    assert told(rows(path)) == [("schön", None), ("日本", None), ("😀", None)]


def test_an_encoding_can_be_named(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("schön\nда".encode("cp1251", errors="replace"))
    assert told(rows(path, encoding="cp1251"))[1] == ("да", None)
    assert told(rows(path))[1] == (None, "invalid UTF-8")
    with pytest.raises(ValidationError, match="'nonsense' is unknown"):
        SourceConfig(name="s", path="x", encoding="nonsense")


def test_an_empty_file_has_no_rows(tmp_path: Path) -> None:
    for name in ("a.txt", "a.jsonl", "a.csv", "a.txt.gz"):
        (tmp_path / name).write_bytes(b"")
        assert rows(tmp_path / name) == []


def test_gzip_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    lines = "".join(f"line number {number} of many\n" for number in range(20_000)).encode()
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(lines) + gzip.compress(b"second member\n"))
    assert len(rows(path)) == 20_001
    packed = gzip.compress(lines)
    path.write_bytes(packed[: len(packed) // 2])
    found = told(rows(path))
    assert found[-1] == (None, "gzip ends too early")
    assert found[0] == ("line number 0 of many", None)
    assert 5_000 < len(found) < 20_000
    path.write_bytes(packed[:1000] + b"\xff" * 1000 + packed[2000:])
    assert told(rows(path))[-1][1] in ("gzip is damaged", "invalid UTF-8")
    path.write_bytes(b"no gzip at all")
    assert told(rows(path)) == [(None, "gzip is damaged")]


def test_a_long_line_is_never_held(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with path.open("wb") as file:
        file.write(b"before\n")
        for _ in range(64):
            file.write(b"x" * (1 << 20))
        file.write(b"\nafter")
    tracemalloc.start()
    found = list(lines_of(Store.at(str(path)), "utf-8", LIMIT))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 << 20
    assert [found[0], found[2]] == [b"before", b"after"]
    assert [row.reason for row in rows(path)] == [None, "line of more than 65536 bytes", None]


@pytest.mark.parametrize("ends", ["", "\n"])
def test_a_line_of_just_the_limit_is_one(tmp_path: Path, ends: str) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a" * 10 + "\n" + "b" * 11 + ends)
    assert [row.reason for row in rows(path, limit=10)] == [None, "line of more than 10 bytes"]


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [
        '{"text": "yes", "lang": "en", "g": 7}',
        '{"text": null}',
        '{"other": 1}',
        '{"text": 3}',
        "[1]",
        "{broken",
        '{"text": "a\\u0000b"}',
        '{"text": "\\ud800"}',
        "[" * 100_000,
    ]
    path.write_text("\n".join(lines))
    found = rows(path, limit=1 << 20, group="g")
    assert found[0] == RawRow("yes", "en", None, None, "7")
    reasons = ["null", "no 'text'", "'text' is int", "no object", "not JSON", "NUL", "invalid UTF-8", "not JSON"]
    assert [row.reason for row in found[1:]] == reasons


def test_csv_and_tsv(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('text,lang,de\n"two\nlines",en,zwei\nshort\n"quote ""in""",en,x\n')
    found = rows(path, right="de", right_lang="de")
    assert found[0] == RawRow("two\nlines", "en", "zwei", "de", None)
    assert [row.reason for row in found] == [None, "no 'de'", None]
    assert found[2].text == 'quote "in"'
    (tmp_path / "b.tsv").write_text("a\ttext\n1\tone\n")
    assert rows(tmp_path / "b.tsv")[0].text == "one"


def test_a_quote_in_tsv_is_a_letter(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('text\tlang\n"Well, she said\ten\nThe end.\ten\n')
    assert [(row.text, row.lang) for row in rows(tmp_path / "a.tsv")] == [('"Well, she said', "en"), ("The end.", "en")]


@pytest.mark.parametrize("content", [b"\xff\xfeo\x00k\x00\n\x00x", b"\xff\xfeo\x00k\x00\n\x00\x00\xd8a\x00\n\x00"])
def test_utf_16_that_is_cut_or_broken_is_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    found = rows(tmp_path / "a.txt")
    assert (found[-1].reason or "").startswith("invalid utf-16")


def test_a_language_that_is_no_text_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("text,lang\nA fine line.,fran\xe7ais\n".encode("latin-1"))
    assert [row.reason for row in rows(tmp_path / "a.csv")] == ["invalid UTF-8"]


def test_an_open_quote_does_not_swallow_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('text\nfine\n"never closed\n' + "line\n" * 100)
    found = rows(path, limit=50)
    assert told(found)[0] == ("fine", None)
    assert any((row.reason or "").startswith("no CSV") for row in found)
    assert found[-1].text == "line"


def test_moses_pairs(tmp_path: Path) -> None:
    (tmp_path / "a.en").write_text("one\ntwo\nthree\n")
    with gzip.open(tmp_path / "a.de.gz", "wb") as file:
        file.write(b"eins\nzw\xffei\n")
    values = {"format": "moses", "translations": str(tmp_path / "a.de.gz"), "lang": "en", "right_lang": "de"}
    found = rows(tmp_path / "a.en", **values)
    assert found[0] == RawRow("one", "en", "eins", "de")
    assert [row.reason for row in found[1:]] == ["invalid UTF-8", "no line of a.de.gz beside it"]
    with pytest.raises(ValidationError, match="belong together"):
        SourceConfig(name="s", path="a", format="moses")


def test_gettext_catalogues_name_their_encoding(tmp_path: Path) -> None:
    old = polib.POFile(encoding="iso-8859-1")
    old.metadata = {"Content-Type": "text/plain; charset=ISO-8859-1", "Language": "de"}
    old.append(polib.POEntry(msgid="open", msgstr="öffnen"))
    old.save(str(tmp_path / "de.po"))
    old.save_as_mofile(str(tmp_path / "de.mo"))
    assert "öffnen".encode("latin-1") in (tmp_path / "de.mo").read_bytes()
    for name in ("de.po", "de.mo"):
        assert rows(tmp_path / name) == [RawRow("open", "en", "öffnen", "de")]


def test_a_template_without_an_encoding_is_utf_8(tmp_path: Path) -> None:
    header = 'msgid ""\nmsgstr "Content-Type: text/plain; charset=CHARSET\\n"\n\n'
    (tmp_path / "de.po").write_text(header + 'msgid "charset=latin-1"\nmsgstr "öffnen"\n')
    assert rows(tmp_path / "de.po") == [RawRow("charset=latin-1", "en", "öffnen", "de")]


def test_gettext_catalogues(tmp_path: Path) -> None:
    path = tmp_path / "xx.po"
    path.write_text(PO)
    assert rows(path) == [
        RawRow("Open the file", "en", "Abrir o arquivo", "pt"),
        RawRow("many files", "en", "muitos arquivos", "pt"),
    ]
    compiled = tmp_path / "de" / "LC_MESSAGES" / "app.mo"
    compiled.parent.mkdir(parents=True)
    polib.pofile(PO).save_as_mofile(str(compiled))
    assert rows(compiled)[0] == RawRow("Open the file", "en", "Abrir o arquivo", "de")
    compiled.write_bytes(b"no catalogue")
    assert [row.reason for row in rows(compiled)] == ["no gettext catalogue"]
    path.write_bytes(b'msgid "a"\nmsgstr "\xff"\n')
    assert [row.reason for row in rows(path)] == ["no gettext catalogue"]


def test_tmx(tmp_path: Path) -> None:
    path = tmp_path / "a.tmx"
    path.write_text(TMX)
    found = rows(path)
    assert found[:2] == [RawRow("Good bday", "en", "Guten Tag", "de"), RawRow("Good bday", "en", "Bonjour", "fr")]
    assert found[2].reason == "translation unit of fewer than two languages"
    assert [row.right for row in rows(path, lang="fr", right_lang="de") if row.reason is None] == ["Guten Tag"]
    path.write_text(TMX[: TMX.index('<tu><tuv xml:lang="en"><seg>Alone')])
    assert [row.reason for row in rows(path)] == [None, None, "no well-formed XML"]


def test_a_language_may_come_twice_in_a_unit(tmp_path: Path) -> None:
    variants = "".join(
        f'<tuv xml:lang="{lang}"><seg>{text}</seg></tuv>'
        for lang, text in (("en", "bus"), ("pt-PT", "autocarro"), ("pt-BR", "ônibus"))
    )
    (tmp_path / "a.tmx").write_text(f"<tmx><body><tu>{variants}</tu></body></tmx>")
    assert [(row.right, row.right_lang) for row in rows(tmp_path / "a.tmx")] == [("autocarro", "pt"), ("ônibus", "pt")]


def test_tmx_is_not_kept_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.tmx"
    unit = '<tu><tuv xml:lang="en"><seg>{0} text</seg></tuv><tuv xml:lang="de"><seg>{0} Text</seg></tuv></tu>'
    body = "".join(unit.format(number) for number in range(15_000))
    path.write_text(f"<tmx><body>{body}</body></tmx>")
    source = SourceConfig(name="s", path=str(path))
    tracemalloc.start()
    assert sum(1 for _ in read_rows(Store.at(str(path)), source, LIMIT)) == 15_000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 << 20


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "readme.md").write_text("text")
    with pytest.raises(DataError, match=r"sources\.s\.path: .*: 1 files of unknown kind; expected \.parquet"):
        source_files(SourceConfig(name="s", path=str(tmp_path)))
    with pytest.raises(DataError, match="no such file, directory or glob"):
        source_files(SourceConfig(name="s", path=str(tmp_path / "none*.txt")))


def test_a_converted_file_has_all_rows_by_number(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"t{number}"}) + "\n" for number in range(10_000)) + "{\n")
    source = SourceConfig(name="s", path=str(path))
    target = io.BytesIO()
    convert(Store.at(str(path)), source, target, LIMIT)
    parquet = pq.ParquetFile(target)
    assert parquet.num_row_groups == 2
    table = read_raw(parquet, source, [0, 1], is_converted=True)
    assert table.schema.equals(RAW)
    assert table["text"].to_pylist()[9_999] == "t9999"
    assert table["reason"].to_pylist()[10_000] == "not JSON"


@pytest.fixture
def odd_parquet() -> pq.ParquetFile:
    """A column of strings of which some are no text."""
    texts = pa.array([b"fine", b"\xff\xfe", None, b"a\0b", b""]).view(pa.string())
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": texts, "lang": ["en", None, "de", "fr", "it"], "n": [1, 2, 3, 4, 5]}), buffer)
    return pq.ParquetFile(buffer)


def test_parquet_as_it_is(odd_parquet: pq.ParquetFile) -> None:
    table = read_raw(odd_parquet, SourceConfig(name="s", path="x"), [0], is_converted=False)
    assert table.schema.equals(RAW)
    assert table["reason"].to_pylist() == [None, "invalid UTF-8", "null", "NUL", None]
    assert table["lang"].to_pylist() == ["en", None, "de", "fr", "it"]
    named = read_raw(odd_parquet, SourceConfig(name="s", path="x", lang="ko", group="n"), [0], is_converted=False)
    assert named["lang"].to_pylist() == ["ko"] * 5
    assert named["group"].to_pylist() == ["1", "2", "3", "4", "5"]


def test_parquet_of_another_schema_is_told_row_by_row(odd_parquet: pq.ParquetFile) -> None:
    missing = read_raw(odd_parquet, SourceConfig(name="s", path="x", text="title"), [0], is_converted=False)
    assert missing["reason"].to_pylist() == ["no column 'title'"] * 5
    numbers = read_raw(odd_parquet, SourceConfig(name="s", path="x", right="n"), [0], is_converted=False)
    assert set(numbers["reason"].to_pylist()) == {"column 'n' is int64"}


def test_columns_beside_the_text_may_be_of_another_kind(tmp_path: Path) -> None:
    table = pa.table({"text": ["one", "two"], "lang": [["en"], ["de"]], "group": [-1, 7]})
    pq.write_table(table, tmp_path / "a.parquet")
    file = pq.ParquetFile(tmp_path / "a.parquet")
    source = SourceConfig(name="s", path="a.parquet", group="group")
    assert (
        read_raw(file, source, [0], is_converted=False)["reason"].to_pylist()
        == ["column 'lang' is list<element: string>"] * 2
    )
    fine = read_raw(file, source.model_copy(update={"lang_column": "none"}), [0], is_converted=False)
    assert fine["group"].to_pylist() == [None, "7"]
