"""Evaluation sets in Parquet as mteb's tasks: what is read, and what is refused."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedlib.errors import DataError
from embedlib.evaluation.languages import language_codes, language_of
from embedlib.evaluation.tasks import TaskConfig, load_task, task_mark

STS = {"sentence1": ["a", "b", "c"], "sentence2": ["d", "e", "f"], "score": [0.0, 2.5, 5.0]}


def write(path: Path, columns: dict[str, list[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def test_a_set_without_languages_is_one_subset(tmp_path: Path) -> None:
    write(tmp_path / "sts" / "test.parquet", STS)
    task = load_task("Mine", TaskConfig(type="sts", path="sts", language="de"), tmp_path)
    assert task.metadata.type == "STS"
    assert task.metadata.languages == ["deu"]
    assert task.dataset is not None
    assert task.dataset["default"]["test"]["sentence2"][:] == ["d", "e", "f"]


def test_columns_go_by_mtebs_names_and_languages_make_subsets(tmp_path: Path) -> None:
    rows = {
        "text": ["a", "b", "c", "d"],
        "label": ["x"] * 4,
        "topic": ["p", "q", "p", "q"],
        "lang": ["de", "de", "fr", "fr"],
    }
    write(tmp_path / "topics.parquet", rows)
    config = TaskConfig(type="clustering", path="topics.parquet", columns={"label": "topic"})
    task = load_task("Topics", config, tmp_path)
    assert task.hf_subsets == ["de", "fr"]
    assert task.dataset is not None
    assert task.dataset["fr"]["test"]["labels"][:] == [0, 1]


def test_one_file_may_hold_all_splits(tmp_path: Path) -> None:
    rows = {"text": list("abcdef"), "label": ["x", "y"] * 3, "split": ["train"] * 4 + ["test"] * 2}
    write(tmp_path / "topics.parquet", rows)
    task = load_task("Topics", TaskConfig(type="classification", path="topics.parquet"), tmp_path)
    assert task.dataset is not None
    assert {split: len(data) for split, data in task.dataset["default"].items()} == {"test": 2, "train": 4}


def test_bitext_of_a_column_a_language(tmp_path: Path) -> None:
    write(tmp_path / "flores.parquet", {"id": [1], "deu_Latn": ["Hallo"], "eng_Latn": ["hello"], "fra_Latn": ["salut"]})
    task = load_task("Flores", TaskConfig(type="bitext", path="flores.parquet", pivot="eng_Latn"), tmp_path)
    assert sorted(task.hf_subsets) == ["deu_Latn-eng_Latn", "fra_Latn-eng_Latn"]


def write_retrieval(directory: Path, **changes: dict[str, list[Any]]) -> None:
    tables: dict[str, dict[str, list[Any]]] = {
        "corpus": {
            "_id": ["d1", "d2", "d3"],
            "text": ["eins", "one", "two"],
            "lang": ["de", "en", "en"],
            "par": [1, 1, 2],
        },
        "queries": {"_id": ["q1", "q2"], "text": ["eins?", "one?"], "lang": ["de", "en"]},
        "qrels": {"query-id": ["q1", "q2"], "corpus-id": ["d1", "d2"], "par": [1, 1]},
    }
    for name, columns in (tables | changes).items():
        write(directory / f"{name}.parquet", columns)


def test_retrieval_within_and_across_languages(tmp_path: Path) -> None:
    write_retrieval(tmp_path)
    within = load_task("Within", TaskConfig(type="retrieval", path="."), tmp_path)
    assert within.dataset is not None
    assert within.dataset["de"]["test"]["relevant_docs"] == {"q1": {"d1": 1}}
    across = load_task("Across", TaskConfig(type="retrieval", path=".", join="par", pivot="en"), tmp_path)
    assert across.dataset is not None
    assert list(across.dataset) == ["de-en"]
    assert across.dataset["de-en"]["test"]["relevant_docs"] == {"q1": {"d2": 1}}
    assert across.dataset["de-en"]["test"]["corpus"]["id"][:] == ["d2", "d3"]


@pytest.mark.parametrize(
    ("config", "columns", "message"),
    [
        ({"type": "sts"}, {"sentence1": ["a"], "sentence2": ["b"]}, "no column 'score'; found sentence1, sentence2"),
        ({"type": "sts"}, STS | {"score": [1.0, 1.0, 1.0]}, "expected at least two values"),
        ({"type": "sts"}, STS | {"score": [1.0, None, 2.0]}, "column 'score' has 1 empty values"),
        ({"type": "sts"}, STS | {"score": [1.0, float("nan"), 2.0]}, "row 1 is not finite"),
        ({"type": "sts"}, STS | {"sentence1": ["a", " ", "c"]}, "row 1 of column 'sentence1' is ' '"),
        ({"type": "clustering"}, {"text": ["a", "b"], "label": ["x", "x"]}, "expected at least two values"),
        (
            {"type": "clustering", "languages": ["de"]},
            {"text": ["a", "b"], "label": [1, 2], "lang": ["fr", "fr"]},
            "no row is in 'de'; expected of ..fr",
        ),
        (
            {"type": "pair_classification"},
            {"sentence1": ["a", "b"], "sentence2": ["c", "d"], "label": ["entails", "not"]},
            "label of 'default' is 'entails'; expected 0 or 1",
        ),
        ({"type": "reranking"}, {"query": ["a"], "positive": ["b"], "negative": ["c"]}, "expected lists of texts"),
        ({"type": "classification"}, {"text": ["a", "b"], "label": [1, 2]}, "trains on what it scores"),
        ({"type": "reranking"}, {"query": ["a"], "positive": [["b"]], "negative": [[]]}, "no negative"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    tmp_path: Path, config: dict[str, Any], columns: dict[str, list[Any]], message: str
) -> None:
    write(tmp_path / "test.parquet", columns)
    with pytest.raises(DataError, match=message):
        load_task("Bad", TaskConfig(path="test.parquet", **config), tmp_path)


def test_ids_may_be_numbers_and_relevance_is_whole(tmp_path: Path) -> None:
    numbered = {
        "corpus": {"_id": [1, 2], "text": ["eins", "two"]},
        "queries": {"_id": [7], "text": ["eins?"]},
        "qrels": {"query-id": [7], "corpus-id": [1], "score": [2.0]},
    }
    write_retrieval(tmp_path, **numbered)
    task = load_task("Mine", TaskConfig(type="retrieval", path="."), tmp_path)
    assert task.dataset is not None
    assert task.dataset["default"]["test"]["relevant_docs"] == {"7": {"1": 2}}
    write_retrieval(tmp_path, **numbered | {"qrels": numbered["qrels"] | {"score": [0.5]}})
    with pytest.raises(DataError, match=r"score of qrels is 0\.5; expected whole numbers"):
        load_task("Mine", TaskConfig(type="retrieval", path="."), tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"queries": {"_id": [], "text": [], "lang": []}}, "no queries"),
        ({"qrels": {"query-id": ["q1"], "corpus-id": ["nought"]}}, "no query of 'de' has a relevant document"),
    ],
)
def test_retrieval_without_queries_or_answers_is_refused(
    tmp_path: Path, changes: dict[str, dict[str, list[Any]]], message: str
) -> None:
    write_retrieval(
        tmp_path, **{name: {k: pa.array(v, pa.string()) for k, v in table.items()} for name, table in changes.items()}
    )
    with pytest.raises(DataError, match=message):
        load_task("Bad", TaskConfig(type="retrieval", path="."), tmp_path)


def test_files_that_are_no_parquet_are_named(tmp_path: Path) -> None:
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(DataError, match=r"broken\.parquet is no readable Parquet file"):
        load_task("Bad", TaskConfig(type="sts", path="broken.parquet"), tmp_path)
    with pytest.raises(DataError, match=r"nowhere\.parquet is not there"):
        load_task("Bad", TaskConfig(type="sts", path="nowhere.parquet"), tmp_path)


def test_the_mark_follows_content_and_settings_but_not_the_place(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write(tmp_path / name / "test.parquet", STS)
    config = TaskConfig(type="sts", path="one")
    assert task_mark(config, tmp_path) == task_mark(config.model_copy(update={"path": "two"}), tmp_path)
    assert task_mark(config, tmp_path) != task_mark(config.model_copy(update={"limit": 2}), tmp_path)
    write(tmp_path / "two" / "test.parquet", STS | {"score": [0.0, 2.6, 5.0]})
    assert task_mark(config, tmp_path) != task_mark(config.model_copy(update={"path": "two"}), tmp_path)


@pytest.mark.parametrize(
    ("subset", "codes", "language"),
    [
        ("de", ["deu-Latn"], "de"),
        ("arb_Arab-eng_Latn", ["arb-Arab", "eng-Latn"], "ar"),
        ("eng-jpn", ["eng-Latn", "jpn-Jpan"], "ja"),
        ("zho_Hans", ["zho-Hans"], "zh"),
        ("default", ["und-Zyyy"], "und"),
    ],
)
def test_languages_of_subsets(subset: str, codes: list[str], language: str) -> None:
    assert language_codes(subset) == codes
    assert language_of(subset) == language
