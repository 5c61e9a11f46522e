from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedlib.errors import DataError
from embedlib.pairs import PairColumns, read_pairs


def written(path: Path, rows: list[dict[str, Any]], **options: int) -> str:
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return str(path)


ROWS = [
    {"text": "b", "answer": "x", "language": "en", "page": "one"},
    {"text": "a", "answer": "y", "language": "de", "page": "two"},
    {"text": "b", "answer": "y", "language": "fr", "page": None},
    {"text": "b", "answer": "x", "language": "en", "page": "one"},
    {"text": "a", "answer": "z", "language": "de", "page": "two"},
]
COLUMNS = PairColumns(query="text", positive="answer", lang="language", document="page")


def test_pairs_are_distinct_queries_with_all_their_positives(tmp_path: Path) -> None:
    pairs = read_pairs(written(tmp_path / "pairs.parquet", ROWS, row_group_size=2), COLUMNS, 100)
    assert pairs.queries.to_pylist() == [{"id": 0, "text": "b", "lang": "en"}, {"id": 1, "text": "a", "lang": "de"}]
    assert pairs.positives["text"].to_pylist() == ["x", "y", "z"]
    assert pairs.positives["document"].to_pylist() == ["one", "two", "two"]
    assert pairs.links.tolist() == [[0, 0], [0, 1], [1, 1], [1, 2]]


def test_broken_pairs_are_rejected_by_file_and_row(tmp_path: Path) -> None:
    bad = [
        {**ROWS[0], "answer": " "},
        ROWS[1],
        {**ROWS[2], "text": None},
        {**ROWS[3], "text": "x" * 101, "answer": None},
    ]
    (tmp_path / "in").mkdir()
    written(tmp_path / "in" / "0.parquet", ROWS)
    second = written(tmp_path / "in" / "1.parquet", bad)
    pairs = read_pairs(str(tmp_path / "in"), COLUMNS, 100)
    assert [(row.source, row.row, row.reason) for row in pairs.rejected] == [
        (second, 0, "empty"),
        (second, 2, "null"),
        (second, 3, "longer than 100 characters"),
    ]
    assert len(pairs.links) == 4


def test_what_is_no_file_of_pairs_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "pairs.parquet", ROWS)
    with pytest.raises(DataError, match="no column 'query'"):
        read_pairs(path, PairColumns(), 100)
    with pytest.raises(DataError, match="no such file"):
        read_pairs(str(tmp_path / "none.parquet"), COLUMNS, 100)
    with pytest.raises(DataError, match="no pair that can be used; 5 rejected"):
        read_pairs(path, COLUMNS.model_copy(update={"lang": None, "document": None}), 0)
    (tmp_path / "pairs.csv").write_text("text,answer\na,b\n")
    with pytest.raises(DataError, match="expected Parquet"):
        read_pairs(str(tmp_path / "pairs.csv"), COLUMNS, 100)
