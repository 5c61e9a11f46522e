from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedlib.errors import DataError
from embedlib.evaluation.sts import StsSet, load_sts, score_sts
from embedlib.metrics import Vectors


def write(path: Path, **columns: list[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def test_a_directory_with_a_test_file_is_that_file(tmp_path: Path) -> None:
    folder = tmp_path / "stsbenchmark"
    write(folder / "test.parquet", sentence1=["a"], sentence2=["b"], score=[2.5], genre=["news"])
    write(folder / "train.parquet", sentence1=["c"], sentence2=["d"], score=[1.0])
    (only,) = load_sts(folder)
    assert only == StsSet("stsbenchmark", ["a"], ["b"], np.array([2.5]))


def test_a_directory_of_sets_is_one_set_a_file(tmp_path: Path) -> None:
    for name in ("STS13", "STS12"):
        write(tmp_path / f"{name}.parquet", sentence1=[name], sentence2=["b"], score=[1], raw_sentence1=["A"])
    sets = load_sts(tmp_path)
    assert [(one.name, one.sentence1) for one in sets] == [("STS12", ["STS12"]), ("STS13", ["STS13"])]
    assert sets[1] == load_sts(tmp_path / "STS13.parquet")[0]


def test_languages_become_sets(tmp_path: Path) -> None:
    columns: dict[str, list[object]] = {"sentence1": ["x", "y", "z"], "sentence2": ["a", "b", "c"], "score": [1, 2, 3]}
    file = write(tmp_path / "multi" / "test.parquet", lang=["en", "de", "en"], **columns)
    german, english = load_sts(file)
    assert (german.name, german.sentence1) == ("multi/de", ["y"])
    assert (english.name, english.sentence2, english.score.tolist()) == ("multi/en", ["a", "c"], [1, 3])


def test_each_sentence_is_encoded_once() -> None:
    angle = {"a": 0.0, "b": 0.1, "c": 0.5, "d": 1.5}
    calls: list[list[str]] = []

    def encode(texts: list[str]) -> Vectors:
        calls.append(texts)
        return np.array([[np.cos(angle[text]), np.sin(angle[text])] for text in texts])

    sets = [
        StsSet("same order", ["a", "a", "a"], ["b", "c", "d"], np.array([5.0, 3.0, 1.0])),
        StsSet("reversed", ["a", "a", "a"], ["b", "c", "d"], np.array([1.0, 3.0, 5.0])),
    ]
    assert score_sts(encode, iter(sets)) == pytest.approx({"same order": 100, "reversed": -100})
    assert calls == [["a", "b", "c", "d"]]


def test_unusable_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no Parquet file"):
        load_sts(tmp_path)
    with pytest.raises(DataError, match="no Parquet file"):
        load_sts(tmp_path / "absent.parquet")
    with pytest.raises(DataError, match=r"no column 'score'; found sentence1, sentence2"):
        load_sts(write(tmp_path / "a.parquet", sentence1=["a"], sentence2=["b"]))
    with pytest.raises(DataError, match="'sentence2' has 1 empty"):
        load_sts(write(tmp_path / "b.parquet", sentence1=["a", "b"], sentence2=["b", None], score=[1, 2]))
    (tmp_path / "c.parquet").write_text("not Parquet")
    with pytest.raises(DataError, match="not a readable Parquet file"):
        load_sts(tmp_path / "c.parquet")
    with pytest.raises(DataError, match="1 vectors for 2 texts"):
        score_sts(lambda _: np.ones((1, 2)), [StsSet("a", ["a"], ["b"], np.array([1.0]))])
