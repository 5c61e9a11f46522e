"""Every kind of input file gives the same rows; what is no row is told apart with its reason."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedlib import sources
from embedlib.errors import DataError
from embedlib.sources import ColumnsConfig, Part, check_texts, convert, input_files, plan_parts, read_part
from embedlib.storage import Store

TEXTS = ["one", "zwei, drei", "quatre\tcinq", "шесть"]
COLUMNS = ColumnsConfig()


def rows_of(path: Path, columns: ColumnsConfig = COLUMNS, rows_per_part: int = 3) -> list[dict[str, object]]:
    files = input_files(str(path))
    parts = plan_parts(files, columns, rows_per_part)
    return [row for part in parts for row in read_part(part, files[0], columns, 100).rows.to_pylist()]


def converted(path: Path, tmp_path: Path, columns: ColumnsConfig = COLUMNS) -> Path:
    convert(Store.at(str(path)), tmp_path / "converted.parquet", columns)
    return tmp_path / "converted.parquet"


def test_parquet_rows_are_numbered_over_all_files(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "a.parquet", row_group_size=2)
    pq.write_table(pa.table({"text": ["seven"]}), tmp_path / "b.parquet")
    expected = [{"id": number, "text": text} for number, text in enumerate([*TEXTS, "seven"])]
    assert rows_of(tmp_path) == expected
    assert rows_of(tmp_path / "*.parquet") == expected


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 12), st.integers(1, 12))
def test_parts_cover_every_row_once(num_rows: int, rows_per_part: int, row_group_size: int, batch_rows: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        folder = Path(pytest.importorskip("tempfile").mkdtemp())
        patch.chdir(folder)
        patch.setattr(sources, "READ_ROWS", batch_rows)
        texts = [f"text {number}" for number in range(num_rows)]
        pq.write_table(pa.table({"text": texts}), "a.parquet", row_group_size=row_group_size)
        assert [row["text"] for row in rows_of(folder, rows_per_part=rows_per_part)] == texts


def test_a_file_that_lost_rows_since_it_was_planned_is_told_of(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["kept"]}), path)
    with pytest.raises(DataError, match="1 rows; expected 3 or more"):
        read_part(Part(str(path), 1, 2, 0), Store.at(str(path)), COLUMNS, 100)


@pytest.mark.parametrize("ending", ["jsonl", "csv", "txt"])
def test_other_kinds_of_files_give_the_same_rows(ending: str, tmp_path: Path) -> None:
    file = tmp_path / f"in.{ending}"
    if ending == "jsonl":
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    elif ending == "csv":
        file.write_text("text\n" + "".join(f'"{text}"\n' for text in TEXTS))
    else:
        file.write_text("\n".join(TEXTS))
    expected = [{"id": number, "text": text} for number, text in enumerate(TEXTS)]
    assert rows_of(converted(file, tmp_path)) == expected


def test_ids_and_kept_columns_go_along(tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text("".join(json.dumps({"key": f"k{n}", "t": text, "n": n}) + "\n" for n, text in enumerate(TEXTS)))
    columns = ColumnsConfig(text="t", id="key", keep=["n"])
    rows = rows_of(converted(file, tmp_path, columns), columns)
    assert rows[1] == {"id": "k1", "text": "zwei, drei", "n": 1}
    pq.write_table(pa.table({"text": TEXTS, "id": [9, 8, 7, 6]}), tmp_path / "own.parquet")
    assert [row["id"] for row in rows_of(tmp_path / "own.parquet")] == [9, 8, 7, 6]


def test_broken_lines_keep_their_number_and_get_a_reason(tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    lines = [b'{"text": "good"}', b"{", b'{"other": 1}', b'{"text": 3}', b'{"text": "\xff"}', b'{"text": null}', b"[]"]
    file.write_bytes(b"\n".join([*lines, b'{"text": " "}', b'{"text": "' + b"x" * 101 + b'"}', b'{"text": "end"}']))
    path = converted(file, tmp_path)
    texts = read_part(Part(str(path), 0, 10, 0), Store.at(str(path)), COLUMNS, 100)
    assert texts.rows.to_pylist() == [{"id": 0, "text": "good"}, {"id": 9, "text": "end"}]
    assert [(row.row, row.reason) for row in texts.rejected] == [
        (1, "not JSON"),
        (2, "no 'text'"),
        (3, "'text' is int"),
        (4, "invalid UTF-8"),
        (5, "null"),
        (6, "no 'text'"),
        (7, "empty"),
        (8, "longer than 100 characters"),
    ]
    assert all(len(row.excerpt) <= 200 for row in texts.rejected)


def test_bytes_that_are_no_utf_8_are_told(tmp_path: Path) -> None:
    column = pa.array([b"good", b"\xff\xfe", None], pa.binary()).view(pa.string())
    found = check_texts(pa.table({"text": column}), Part("f", 10, 3, 100), COLUMNS, 100)
    assert found.numbers == [100]
    assert [(row.row, row.reason) for row in found.rejected] == [(11, "invalid UTF-8"), (12, "null")]
    file = tmp_path / "in.csv"
    file.write_bytes(b"text\ngood\n\xff\n")
    path = converted(file, tmp_path)
    assert read_part(Part(str(path), 0, 2, 0), Store.at(str(path)), COLUMNS, 100).rejected[0].reason == "invalid UTF-8"


def test_a_line_of_a_megabyte_is_read(tmp_path: Path) -> None:
    file = tmp_path / "in.txt"
    file.write_text("x" * 2**20 + "\nshort\n")
    path = converted(file, tmp_path)
    texts = read_part(Part(str(path), 0, 2, 0), Store.at(str(path)), COLUMNS, 2**21)
    assert [len(text) for text in texts.rows["text"].to_pylist()] == [2**20, 5]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.parquet", b"no parquet", "not a readable Parquet file"),
        ("a.doc", b"", r"unknown ending; expected one of \.parquet"),
        ("b.parquet", None, r"no column 'text'; it has \['other'\]"),
        ("c.parquet", None, "column 'text' is int64; expected string"),
    ],
)
def test_what_cannot_be_read_is_refused(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is None:
        pq.write_table(pa.table({"other" if name == "b.parquet" else "text": [1]}), tmp_path / name)
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        plan_parts(input_files(str(tmp_path / name)), COLUMNS, 10)


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file, directory or glob"):
        input_files(str(tmp_path / "none.parquet"))
    with pytest.raises(DataError, match=r"nowhere://x: no filesystem that pyarrow can open"):
        input_files("nowhere://x")
    (tmp_path / "in.jsonl").write_text('{"other": 1}\n')
    with pytest.raises(DataError, match=r"no rows with \['text'\] among its first 1 lines"):
        converted(tmp_path / "in.jsonl", tmp_path)
    (tmp_path / "in.csv").write_text("other\n1\n")
    with pytest.raises(DataError, match=r"no column 'text'; it has \['other'\]"):
        converted(tmp_path / "in.csv", tmp_path)


def test_a_column_of_mixed_types_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "a", "n": 1}\n{"text": "b", "n": "x"}\n')
    with pytest.raises(DataError, match="column 'n': values of different types"):
        converted(tmp_path / "in.jsonl", tmp_path, ColumnsConfig(keep=["n"]))


def test_a_part_of_broken_rows_alone_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "texts.parquet"
    pq.write_table(pa.table({"text": [" ", ""]}), path)
    columns = ColumnsConfig()
    (part,) = plan_parts([Store.at(str(path))], columns, 10)
    texts = read_part(part, Store.at(str(path)), columns, 100)
    assert (len(texts.rows), [row.reason for row in texts.rejected]) == (0, ["empty", "empty"])
