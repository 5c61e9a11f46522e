"""Contrastive training on a real local cluster: stages, early stop, a killed worker, and merging what came of it."""

import json
import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from sentence_transformers import SentenceTransformer

from embedlib.errors import ConfigError
from embedlib.model_directory import trained_dimensions
from jobs.merge import MergeConfig, merge
from jobs.metrics import NOTE
from jobs.status import StatusConfig, stages
from jobs.train import TrainConfig, main
from tests.conftest import corpus_rows
from tests.jobs.processes import kill_ray_workers, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Translations, each with a sentence of another meaning in the language of the positive."""
    rows, rng = corpus_rows(), random.Random(0)
    by_lang = {lang: [row for row in rows if row["lang"] == lang] for lang in ("en", "de", "ru", "th")}
    table: dict[str, list[Any]] = {"query": [], "positive": [], "negatives": [], "lang": []}
    for lang in ("de", "ru", "th"):
        for english, other in zip(by_lang["en"], by_lang[lang], strict=True):
            table["query"].append(english["text"])
            table["positive"].append(other["text"])
            table["negatives"].append([rng.choice([row for row in by_lang[lang] if row is not other])["text"]])
            table["lang"].append(lang)
    path = tmp_path_factory.mktemp("pairs") / "pairs.parquet"
    pq.write_table(pa.table(table), path)
    return str(path)


def config_for(output: Path, model: Path, pairs: str, **values: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "output": output,
        "model": str(model),
        "datasets": [{"path": pairs, "negatives": "negatives", "lang": "lang"}],
        "validation_share": 0.2,
        "guide": str(model),
        "training": {
            "epochs": 8,
            "batch_size": 8,
            "objective": {"anchor": 0.1, "guide": {"margin": -0.1}, "dimensions": [16]},
            "optimizer": {"learning_rate": 2e-3},
        },
        "workers": {"validate_every": 10, "checkpoint_every": 10},
    }
    return TrainConfig.model_validate(settings | values)


def sample_log(output: Path) -> list[tuple[int, list[int]]]:
    """(step, samples over all workers, sorted), in the order of steps."""
    steps: dict[int, list[int]] = {}
    for path in output.glob("training/*/log/samples-*.jsonl"):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            steps.setdefault(record["step"], []).extend(record["ids"])
    return [(step, sorted(ids)) for step, ids in sorted(steps.items())]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None, tiny_encoder: Path, pairs: str) -> Path:
    output = tmp_path_factory.mktemp("trained") / "run"
    assert main(config_for(output, tiny_encoder, pairs)) == output / "model"
    return output


def test_training_raises_the_validation_and_loads_anywhere(trained: Path, tiny_encoder: Path) -> None:
    manifest = json.loads((trained / "model" / "manifest.json").read_text())
    values = manifest["measurements"]["validation_mrr@10"]
    assert values[-1] > values[0]
    new, old = (SentenceTransformer(str(path), device="cpu") for path in (trained / "model", tiny_encoder))
    assert new.prompts == old.prompts
    assert trained_dimensions(trained / "model") == [16]
    assert not np.allclose(new.encode(["the cat"]), old.encode(["the cat"]), atol=1e-3)
    (note,) = [json.loads(path.read_text()) for path in trained.glob(f"training/*/{NOTE}")]
    assert (note["job"], note["finished"], note["padding_waste"]) == ("train", True, 0)  # laid end to end
    assert note["validation"] == values[-1]


def test_a_rerun_skips_everything_and_another_objective_only_trains(
    trained: Path, tiny_encoder: Path, pairs: str
) -> None:
    times = {path: path.stat().st_mtime_ns for path in trained.rglob("manifest.json")}
    main(config_for(trained, tiny_encoder, pairs))
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("manifest.json")} == times


@pytest.mark.slow
def test_a_killed_worker_loses_and_repeats_nothing(
    trained: Path, tmp_path: Path, tiny_encoder: Path, pairs: str
) -> None:
    output = tmp_path / "run"
    killed: list[int] = []

    def kill() -> None:
        wait_for(lambda: len(sample_log(output)) > 15, "step 15")
        killed.extend(kill_ray_workers("TrainWorker"))

    thread = threading.Thread(target=kill)
    thread.start()
    main(config_for(output, tiny_encoder, pairs))
    thread.join()
    assert killed
    assert sample_log(output) == sample_log(trained)
    for file in sorted((trained / "model").glob("*.safetensors")):
        assert file.read_bytes() == (output / "model" / file.name).read_bytes()


def test_training_ends_early_and_keeps_the_best(tmp_path: Path, tiny_encoder: Path, pairs: str) -> None:
    config = config_for(
        tmp_path / "run",
        tiny_encoder,
        pairs,
        training={"epochs": 400, "batch_size": 8, "optimizer": {"learning_rate": 1e-6, "average": 0.5}},
        workers={"validate_every": 2, "checkpoint_every": 2, "patience": 2},
        guide=None,
    )
    main(config)
    manifest = json.loads((tmp_path / "run" / "model" / "manifest.json").read_text())
    assert len(manifest["measurements"]["validation_steps"]) < 50
    (training,) = [stage for stage in stages(StatusConfig(directory=str(tmp_path))) if stage.kind == "train"]
    assert training.state == "done"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"guide": None}, "guide: none"),
        ({"teacher": "b"}, "teacher: 'b', but"),
        ({"training": {"objective": {"distil": {"weight": 1.0}}}}, "teacher: none"),
        (
            {"training": {"objective": {"scores": {"margin_mse": 1.0}}}},
            "datasets.0.positive_scores: none; training.objective",
        ),
        ({"training": {"objective": {"cosent": {"weight": 1.0}}}}, "info_nce would contrast pairs of whatever label"),
        (
            {"training": {"objective": {"cosent": {"weight": 1.0}, "info_nce": {"weight": 0.0}}}},
            "datasets.0.label: none",
        ),
    ],
)
def test_an_objective_that_lacks_something_is_refused(
    tmp_path: Path, tiny_encoder: Path, pairs: str, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        config_for(tmp_path / "run", tiny_encoder, pairs, **values)


def test_merged_models_lie_between_and_a_search_finds_the_better(
    trained: Path, tmp_path: Path, tiny_encoder: Path, pairs: str
) -> None:
    half = merge(MergeConfig(output=tmp_path / "half", models=[str(tiny_encoder), str(trained / "model")]))
    values = {
        "output": tmp_path / "found",
        "base": str(tiny_encoder),
        "models": [str(trained / "model"), str(tiny_encoder)],
        "method": "self_positioning",
        "probe": {
            "data": [{"path": pairs, "lang": "lang"}],
            "batch_size": 16,
            "epochs": 3,
            "learning_rate": 0.1,
        },
    }
    found = merge(MergeConfig.model_validate(values))
    weights = json.loads((found / "manifest.json").read_text())["measurements"]["weights"]
    # From a half towards the trained model, which is better on these pairs; the base's own task vector is nothing.
    assert weights[0] > 0.6
    note = json.loads((tmp_path / "found" / NOTE).read_text())
    assert (note["job"], note["stage"], note["finished"]) == ("merge", "position", True)
    assert weights[1] == 0.5
    vectors = [SentenceTransformer(str(path), device="cpu").encode(["the cat"]) for path in (half, found)]
    assert all(np.isfinite(each).all() for each in vectors)


def test_models_that_do_not_fit_are_refused_by_name(
    tmp_path: Path, tiny_encoder: Path, tiny_xlmr: Path, embedded_teacher: Path
) -> None:
    with pytest.raises(ConfigError, match="pieces"):
        merge(MergeConfig(output=tmp_path / "merged", models=[str(tiny_encoder), str(embedded_teacher)]))
