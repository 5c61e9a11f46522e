"""Stage `texts` of a training: what is kept for validation, and whose keys errors name; none of it needs a cluster."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from embedlib.dataset import ANSWERS
from embedlib.encoder import Encoder
from embedlib.errors import DataError
from embedlib.model_directory import PROMPTS_NAME, write_json
from embedlib.training_texts import TrainingData, read_training_texts
from jobs.embed import EmbedConfig
from jobs.merge import MergeConfig, make_probe
from jobs.train import TrainConfig, make_texts, make_vectors, split, write_samples, write_texts

LABELS = {"cosent": {"weight": 1.0}, "info_nce": {"weight": 0.0}}


def pairs(path: Path, number: int = 24, **columns: list[Any]) -> str:
    queries = [f"{path.stem} query {row}" for row in range(number)]
    table = {"query": queries, "positive": [f"{path.stem} answer {row}" for row in range(number)]}
    pq.write_table(pa.table(table | columns), path)
    return str(path)


def config_of(output: Path, datasets: list[dict[str, Any]], **values: Any) -> TrainConfig:
    return TrainConfig.model_validate({"output": output, "model": "base", "datasets": datasets} | values)


@pytest.mark.parametrize(("share", "plain", "graded"), [(0.2, 5, 10), (0.5, 12, 12)])
def test_some_of_every_dataset_is_kept_for_validation(tmp_path: Path, share: float, plain: int, graded: int) -> None:
    scores = [float(row % 2) for row in range(24)]
    datasets = [
        TrainingData(path=pairs(tmp_path / "plain.parquet")),
        TrainingData(path=pairs(tmp_path / "graded.parquet", score=scores), label="score"),
        TrainingData(path=pairs(tmp_path / "few.parquet", 8, score=scores[:8]), label="score"),
    ]
    found, apart = split(read_training_texts(datasets, 100), share)
    for number, (queries, held) in enumerate(((24, plain), (24, graded), (8, 4))):
        here, there = (each.samples[each.datasets[each.groups] == number, 0] for each in (found, apart))
        assert len(np.unique(here)) + len(np.unique(there)) == queries
        assert len(np.unique(there)) == held


def test_a_group_of_which_nothing_is_left_is_told(tmp_path: Path) -> None:
    path = pairs(tmp_path / "pairs.parquet", 6, lang=["ar", "de", "en", "fr", "ja", "th"])
    directory = make_texts(config_of(tmp_path / "run", [{"path": path, "lang": "lang"}], validation_share=0.8))
    groups = json.loads((directory / "manifest.json").read_text())["measurements"]["groups"]
    assert sum(groups.values()) == 1
    assert groups["0:th"] == 0


def test_files_that_moved_are_the_same_texts(tmp_path: Path) -> None:
    config = config_of(tmp_path / "run", [{"path": pairs(tmp_path / "pairs.parquet")}])
    before = (make_texts(config) / "manifest.json").stat().st_mtime_ns
    (tmp_path / "pairs.parquet").rename(tmp_path / "moved.parquet")
    moved = config_of(tmp_path / "run", [{"path": str(tmp_path / "moved.parquet")}])
    assert (make_texts(moved) / "manifest.json").stat().st_mtime_ns == before


def test_labels_that_order_nothing_are_refused(tmp_path: Path) -> None:
    plain, alike = pairs(tmp_path / "plain.parquet"), pairs(tmp_path / "alike.parquet", score=[0.5] * 24)
    graded = {"path": alike, "label": "score"}
    with pytest.raises(
        DataError, match=r"validation.1.label: 0.5 for all 24 pairs of validation; .* to rank pairs by$"
    ):
        make_texts(config_of(tmp_path / "run", [{"path": plain}], validation=[{"path": plain}, graded]))
    with pytest.raises(DataError, match=r"datasets.1.label: 0.5 for all 10 pairs .* or a larger validation_share$"):
        make_texts(config_of(tmp_path / "run", [{"path": plain}, graded | {"objective": LABELS}]))


def test_errors_name_the_keys_that_the_user_wrote(tmp_path: Path) -> None:
    plain, empty = pairs(tmp_path / "plain.parquet"), pairs(tmp_path / "empty.parquet", 1, query=[""])
    with pytest.raises(DataError, match=r"^validation.0: '.*empty.parquet': no row"):
        make_texts(config_of(tmp_path / "run", [{"path": plain}], validation=[{"path": empty}]))
    alike = {"path": pairs(tmp_path / "alike.parquet", score=[0.5] * 24), "label": "score", "objective": LABELS}
    single = {"path": pairs(tmp_path / "single.parquet", 1)}
    for data, message in (
        ({"path": empty}, r"^probe.data.1: '.*empty.parquet': no row"),
        (single, r"^probe.data.1: 1 distinct queries"),
        (alike, r"^probe.data.1.label: 0.5 for all 10 pairs .* or a larger probe.held_out_share$"),
    ):
        values = {"output": tmp_path / "merged", "models": ["a", "b"], "base": "a", "method": "self_positioning"}
        values |= {"probe": {"data": [{"path": plain}, data]}}
        with pytest.raises(DataError, match=message):
            make_probe(MergeConfig.model_validate(values), tmp_path)


def test_a_pair_with_a_label_is_no_right_answer(tmp_path: Path, tiny_encoder: Path) -> None:
    triplet = {"query": ["a"], "positive": ["b"], "negatives": [["c"]]}
    graded = {"query": ["a", "d"], "positive": ["c", "b"], "negatives": [["b"], ["b"]], "score": [0.0, 1.0]}
    for name, columns in (("triplet", triplet), ("graded", graded)):
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
    datasets = [
        TrainingData(path=str(tmp_path / "triplet.parquet"), negatives="negatives"),
        TrainingData(path=str(tmp_path / "graded.parquet"), negatives="negatives", label="score"),
    ]
    found = read_training_texts(datasets, 100)
    texts = [text for each in found.texts.values() for text in each.to_pylist()]
    # What a row without a label says is an answer, and so is the own positive.
    assert [[texts[number] for number in sample if number >= 0] for sample in found.samples] == [
        ["a", "b", "c"],
        ["a", "c"],
        ["d", "b"],
    ]
    write_texts(tmp_path / "texts", found)
    write_samples(tmp_path / "dataset", tmp_path / "texts", Encoder.load(tiny_encoder), 1.0)
    assert not len(np.load(tmp_path / "dataset" / ANSWERS))


@pytest.mark.parametrize(
    ("names", "prompts", "warned"),
    [
        (["query", "document", "passage"], [["query"], ["document"]], []),
        (["query", "passage"], [["query"], ["passage"]], []),
        (["passage"], [[], ["passage"]], ["query"]),
        (["query"], [["query"], []], ["document"]),
        ([], [[], []], []),
    ],
)
def test_a_guide_is_asked_under_its_own_names(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    names: list[str],
    prompts: list[list[str]],
    warned: list[str],
) -> None:
    asked: list[EmbedConfig] = []
    monkeypatch.setattr("jobs.train.embed_all", lambda jobs: asked.extend(jobs) or [])
    config = config_of(tmp_path, [{"path": pairs(tmp_path / "pairs.parquet")}])
    write_json(tmp_path / PROMPTS_NAME, {"prompts": {name: f"{name}: " for name in names}})
    make_vectors(config, "guide", tmp_path, make_texts(config), None)
    assert [job.prompts for job in asked] == prompts
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if line.startswith("warning: guide: ")] == printed
    assert [prompt for prompt in ("query", "document") if f"none for {prompt!r}" in "".join(printed)] == warned


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": "s"}, "datasets.0.label: 's'; expected none, training.objective has no term that reads it"),
        ({"positive_scores": "s", "objective": {}}, "datasets.0.positive_scores: 's'; expected none, datasets.0.obj"),
        ({"negatives": "n", "negative_scores": "s"}, "datasets.0.negative_scores: 's'; expected none, training.obj"),
    ],
)
def test_columns_that_nothing_reads_are_refused(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config_of(tmp_path, [{"path": "a"} | columns])


def test_labels_of_validation_are_read(tmp_path: Path) -> None:
    assert config_of(tmp_path, [{"path": "a"}], validation=[{"path": "b", "label": "s"}]).validation[0].label == "s"
