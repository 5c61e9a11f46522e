from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from embedlib.errors import DataError
from embedlib.training_texts import TrainingData, TrainingTexts, read_training_texts


def written(path: Path, **columns: list[Any]) -> str:
    pq.write_table(pa.table(columns), path)
    return str(path)


def spelled(found: TrainingTexts) -> list[list[str]]:
    """Samples as texts, each with its prompt."""
    texts = [f"{prompt}:{text}" for prompt, each in found.texts.items() for text in each.to_pylist()]
    return [[texts[number] for number in sample if number >= 0] for sample in found.samples]


def test_pairs_triplets_and_mined_negatives_are_one(tmp_path: Path) -> None:
    pairs = written(tmp_path / "pairs.parquet", en=["a", "b"], xx=["A", "B"], lang=["de", "fr"])
    triplets = written(tmp_path / "triplets.parquet", query=["a"], positive=["c"], negatives=["d"])
    mined = written(
        tmp_path / "mined.parquet",
        query=["q", "r"],
        positives=[["p", "p2"], ["A"]],
        negatives=[["n1", "n2", "n3"], []],
    )
    found = read_training_texts(
        [
            TrainingData(path=pairs, query="en", positive="xx", lang="lang", document_prompt="query"),
            TrainingData(path=triplets, negatives="negatives", weight=2.0),
            TrainingData(path=mined, positive="positives", negatives="negatives", max_negatives=2),
        ],
        100,
    )
    assert spelled(found) == [
        ["query:a", "query:A"],
        ["query:b", "query:B"],
        ["query:a", "document:c", "document:d"],
        ["query:q", "document:p", "document:n1", "document:n2"],
        ["query:q", "document:p2", "document:n1", "document:n2"],
        ["query:r", "document:A"],
    ]
    assert found.group_names == ["0:de", "0:fr", "1:", "2:"]
    assert found.groups.tolist() == [0, 1, 2, 3, 3, 3]
    assert found.datasets.tolist() == [0, 0, 1, 2]
    assert found.weights.tolist() == [1, 1, 2, 1]
    assert found.scores is None
    assert found.labels is None
    # A text is known by its prompt: A is both a query-side text and a document.
    assert found.samples[0, 1] != found.samples[5, 1]


def test_what_answers_a_query_in_another_row_is_no_negative_of_it(tmp_path: Path) -> None:
    mined = written(
        tmp_path / "mined.parquet",
        query=["q", "q", "r"],
        positives=[["p", "p2"], ["p3"], ["s"]],
        negatives=[["p3", "n"], ["p", "p2", "n2"], ["p"]],
    )
    found = read_training_texts([TrainingData(path=mined, positive="positives", negatives="negatives")], 100)
    assert [[text.partition(":")[2] for text in sample] for sample in spelled(found)] == [
        ["q", "p", "n"],
        ["q", "p2", "n"],
        ["q", "p3", "n2"],
        ["r", "s", "p"],
    ]


def test_scores_follow_the_negatives_that_are_kept(tmp_path: Path) -> None:
    path = written(
        tmp_path / "mined.parquet",
        query=["q", "r"],
        positives=[["p"], ["s", "t"]],
        positive_scores=[[0.9], [0.8, 0.7]],
        negatives=[["n1", " ", "n3"], ["n1"]],
        negative_scores=[[0.5, 0.4, 0.3], [0.2]],
    )
    data = TrainingData(
        path=path,
        positive="positives",
        negatives="negatives",
        positive_scores="positive_scores",
        negative_scores="negative_scores",
    )
    found = read_training_texts([data], 100)
    assert found.scores is not None
    np.testing.assert_allclose(found.scores, [[0.9, 0.5, 0.3], [0.8, 0.2, -np.inf], [0.7, 0.2, -np.inf]], rtol=1e-6)
    assert [sample[2:] for sample in spelled(found)] == [
        ["document:n1", "document:n3"],
        ["document:n1"],
        ["document:n1"],
    ]


def test_what_one_dataset_does_not_know_is_nan(tmp_path: Path) -> None:
    pairs = written(tmp_path / "pairs.parquet", query=["a", "b"], positive=["A", "B"])
    graded = written(tmp_path / "graded.parquet", query=["c"], positive=["C"], gold=[0.5])
    rated = written(tmp_path / "rated.parquet", query=["d"], positive=["D"], s=[0.9], negatives=[["n"]], t=[[0.1]])
    found = read_training_texts(
        [
            TrainingData(path=pairs),
            TrainingData(path=graded, label="gold"),
            TrainingData(path=rated, positive_scores="s", negatives="negatives", negative_scores="t"),
        ],
        100,
    )
    nan = np.nan
    assert found.labels is not None
    assert found.scores is not None
    np.testing.assert_allclose(found.labels, [nan, nan, 0.5, nan])
    np.testing.assert_allclose(found.scores, [[nan, nan], [nan, nan], [nan, nan], [0.9, 0.1]])


def test_broken_rows_are_told_and_the_rest_is_kept(tmp_path: Path) -> None:
    path = written(
        tmp_path / "pairs.parquet",
        query=["a", None, "c", "d", "e"],
        positive=["A", "B", "  ", "x" * 50, "E"],
        score=[0.1, 0.2, 0.3, 0.4, 0.5],
    )
    found = read_training_texts([TrainingData(path=path, label="score")], 20)
    assert spelled(found) == [["query:a", "document:A"], ["query:e", "document:E"]]
    assert found.labels is not None
    np.testing.assert_allclose(found.labels, [0.1, 0.5], rtol=1e-6)
    assert sorted((row.row, row.reason) for row in found.rejected) == [
        (1, "query: null"),
        (2, "positive: empty"),
        (3, "positive: longer than 20 characters"),
    ]


def test_a_part_of_the_samples_needs_a_part_of_the_texts(tmp_path: Path) -> None:
    path = written(
        tmp_path / "data.parquet", query=["a", "b", "c"], positive=["A", "B", "C"], n=[["D", "A"], ["A"], []]
    )
    found = read_training_texts([TrainingData(path=path, negatives="n")], 100)
    part = found.taken(np.array([False, True, True])).without_idle_texts()
    assert spelled(part) == spelled(found)[1:]
    assert {prompt: texts.to_pylist() for prompt, texts in part.texts.items()} == {
        "query": ["b", "c"],
        "document": ["A", "B", "C"],
    }


def test_languages_are_chosen_before_rows_are_counted(tmp_path: Path) -> None:
    path = written(
        tmp_path / "pairs.parquet",
        query=["a", "b", None, "d"],
        positive=["A", "B", "C", "D"],
        lang=["x", "y", "y", "y"],
    )
    data = TrainingData(path=path, lang="lang", langs=["y"], max_rows=2)
    found = read_training_texts([data], 100)
    assert spelled(found) == [["query:b", "document:B"]]
    assert [row.row for row in found.rejected] == [2]
    with pytest.raises(ValidationError, match="lang names no column"):
        TrainingData(path=path, langs=["y"])


@pytest.mark.parametrize(
    ("columns", "settings", "message"),
    [
        ({"query": ["a"], "positiv": ["b"]}, {}, "no column 'positive'"),
        ({"query": [1], "positive": ["b"]}, {}, "expected string"),
        ({"query": [""], "positive": ["b"]}, {}, "no row that can be used; 1 rejected"),
        (
            {"query": ["a"], "positive": [[1, 2]]},
            {},
            r"datasets.0.positive: 'positive' of .* holds int64; expected text",
        ),
        ({"query": ["a"], "positive": ["b"], "n": [[7]]}, {"negatives": "n"}, "datasets.0.negatives: 'n' of .* int64"),
        (
            {"query": ["a"], "positive": ["b"], "s": ["entails"]},
            {"label": "s"},
            "label: 's' of .* string; expected numbers",
        ),
        ({"query": ["a"], "positive": ["b"], "s": [float("nan")]}, {"label": "s"}, "not finite"),
        (
            {
                "query": ["a", "b"],
                "positive": ["A", "B"],
                "s": [0.5, 0.5],
                "n": [["c", "d"], ["e"]],
                "t": [[0.1], [0.2, 0.3]],
            },
            {"negatives": "n", "positive_scores": "s", "negative_scores": "t"},
            "row 0: 't' is not as long as 'n'",
        ),
        (
            {"query": ["a"], "positive": ["b"], "n": [["c"]], "s": [0.5]},
            {"negatives": "n", "positive_scores": "s"},
            "negative_scores",
        ),
    ],
)
def test_what_cannot_be_read_is_named(
    tmp_path: Path, columns: dict[str, list[Any]], settings: dict[str, str], message: str
) -> None:
    path = written(tmp_path / "data.parquet", **columns)
    with pytest.raises(DataError, match=message):
        read_training_texts([TrainingData.model_validate({"path": path, **settings})], 100)


def test_rows_without_positives_are_told_and_own_texts_are_no_negatives(tmp_path: Path) -> None:
    path = written(
        tmp_path / "data.parquet", query=["a", "b", "c"], positive=[["A"], [], None], n=[["A", "a", "X"], [], []]
    )
    found = read_training_texts([TrainingData(path=path, negatives="n", document_prompt="query")], 100)
    assert spelled(found) == [["query:a", "query:A", "query:X"]]
    assert [(row.row, row.reason) for row in found.rejected] == [(1, "positive: none"), (2, "positive: none")]
