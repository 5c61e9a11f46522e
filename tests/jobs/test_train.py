"""Contrastive training on a real local cluster: stages, early stop, a killed worker, and merging what came of it."""

import json
import os
import random
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from pydantic import ValidationError
from sentence_transformers import SentenceTransformer

from embedlib.contrastive import batch_plan, batches_after, load_encoder, validation_score
from embedlib.dataset import ContrastiveSet
from embedlib.errors import ArtifactError, ConfigError
from embedlib.model_directory import trained_dimensions
from jobs.merge import MergeConfig, merge
from jobs.merge import main as merge_main
from jobs.metrics import NOTE
from jobs.status import StatusConfig, stages
from jobs.train import TrainConfig, main
from tests.conftest import corpus_rows
from tests.jobs.processes import kill_ray_workers, killed_at_the_end, wait_for

REPOSITORY = Path(__file__).parents[2]
METRIC = "validation_mean_of_mrr@10_and_spearman"
LABELS = {"cosent": {"weight": 1.0}, "info_nce": {"weight": 0.0}}
TEACHER = {"distil": {"weight": 1.0}}
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
    pq.write_table(pa.Table.from_pylist(graded_rows()), path.with_name("graded.parquet"))
    return str(path)


def graded_rows() -> list[dict[str, Any]]:
    """Sentences in two other languages whose nouns and predicates are both the same, one of them, or neither."""
    french, spanish = ([row["text"] for row in corpus_rows() if row["lang"] == lang] for lang in ("fr", "es"))
    return [
        {"query": french[row], "positive": spanish[(row + step) % 24], "score": score}
        for row in range(24)
        for step, score in ((0, 1.0), (4, 0.5), (9, 0.0))
    ]


def config_for(output: Path, model: Path, pairs: str, **values: Any) -> TrainConfig:
    graded = {"path": str(Path(pairs).with_name("graded.parquet")), "label": "score"}
    graded |= {"objective": {"info_nce": {"weight": 0}, "cosent": {"weight": 1}, "dimensions": [16, 8]}}
    settings: dict[str, Any] = {
        "output": output,
        "model": str(model),
        "datasets": [{"path": pairs, "negatives": "negatives", "lang": "lang"}, graded],
        "validation_share": 0.2,
        "guide": str(model),
        "training": {
            "epochs": 8,
            "batch_size": 8,
            "objective": {"anchor": 0.1, "guide": {"margin": -0.1}, "dimensions": [16]},
            "optimizer": {"learning_rate": 5e-4},
            "dtype": "float32",
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
    values = manifest["measurements"][METRIC]
    assert values[-1] > values[0]
    new, old = (SentenceTransformer(str(path), device="cpu") for path in (trained / "model", tiny_encoder))
    assert new.prompts == old.prompts
    assert trained_dimensions(trained / "model") == [16]
    assert not np.allclose(new.encode(["the cat"]), old.encode(["the cat"]), atol=1e-3)
    (note,) = [json.loads(path.read_text()) for path in trained.glob(f"training/*/{NOTE}")]
    assert (note["job"], note["finished"], note["padding_waste"]) == ("train", True, 0)  # laid end to end
    assert note["validation"] == values[-1]


def test_vectors_are_made_of_the_texts_that_ask_for_them(trained: Path) -> None:
    texts = [text for file in sorted((trained / "texts").glob("texts-*")) for text in read_texts(file)]
    graded = {row[side] for row in graded_rows() for side in ("query", "positive")}
    dataset = ContrastiveSet.open(trained / "dataset")
    asking = dataset.samples[dataset.datasets_of(np.arange(len(dataset))) == 0]
    for name in ("guide", "base"):
        there = dataset.vectors[name].any(axis=1)
        assert there[asking[asking >= 0]].all()
        assert {text for text, is_there in zip(texts, there, strict=True) if not is_there} >= graded


def read_texts(file: Path) -> list[str]:
    return list(pq.read_table(file)["text"].to_pylist())


def test_a_rerun_skips_everything_and_another_objective_is_refused(
    trained: Path, tiny_encoder: Path, pairs: str
) -> None:
    times = {path: path.stat().st_mtime_ns for path in trained.rglob("manifest.json")}
    config = config_for(trained, tiny_encoder, pairs)
    main(config)
    objective = config.training.objective.model_copy(update={"anchor": 0.2})
    training = config.training.model_copy(update={"objective": objective})
    with pytest.raises(ArtifactError, match=r"run/model: holds model \w+, but this run makes"):
        main(config.model_copy(update={"training": training}))
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


@pytest.mark.slow
def test_a_job_killed_and_resumed_at_other_sizes_ends_as_if_it_had_not_been(
    trained: Path, tmp_path: Path, tiny_encoder: Path, pairs: str
) -> None:
    output, run = tmp_path / "run", tmp_path / "run.yaml"
    config = config_for(output, tiny_encoder, pairs)
    run.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_none=True)))
    command = [sys.executable, str(REPOSITORY / "jobs" / "train.py"), str(run), "--workers.num_workers"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_ADDRESS")}
    for workers, share in (("2", 0.2), ("1", 0.6)):
        with killed_at_the_end([*command, workers]):
            until = share * len(sample_log(trained))
            wait_for(partial(is_past, output, until), f"step {until} with {workers} workers")
        assert not (output / "model").exists()
    subprocess.run([*command, "2"], env=environment, check=True, stdout=subprocess.DEVNULL)
    (log,) = output.glob("training/*/log")
    assert (log / "samples-0001.jsonl").exists()
    assert sample_log(output) == planned(output, config) == sample_log(trained)
    for name in ("loss", METRIC):
        assert last(output, name) == pytest.approx(last(trained, name), rel=0.02), name


@pytest.mark.slow
def test_a_node_that_joins_is_used(tmp_path: Path, tiny_encoder: Path, pairs: str) -> None:
    output = tmp_path / "run"
    # Long enough for a process to start; no vectors are asked for, which would need CPUs of their own.
    settings = {
        "datasets": [{"path": pairs, "lang": "lang"}],
        "guide": None,
        "training": {"epochs": 300, "batch_size": 8, "optimizer": {"learning_rate": 1e-4}},
        "workers": {"num_workers": 1, "max_workers": 2, "checkpoint_every": 10, "validate_every": 1000},
    }
    config = config_for(output, tiny_encoder, pairs, **settings)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_ADDRESS")}
    command = [sys.executable, "-m", "tests.jobs.joining", config.model_dump_json(exclude_none=True)]
    subprocess.run(command, env=environment, cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)
    (log,) = output.glob("training/*/log")
    first, second = (
        [json.loads(line)["step"] for line in (log / f"samples-{rank:04}.jsonl").read_text().splitlines()]
        for rank in range(2)
    )
    assert second
    assert second == first[-len(second) :]
    assert len(second) < len(first)
    assert sample_log(output) == planned(output, config)


def records(output: Path) -> list[dict[str, float]]:
    return [
        json.loads(line)
        for path in output.glob("training/*/log/history.jsonl")
        for line in path.read_text().splitlines()
    ]


def is_past(output: Path, step: float) -> bool:
    return any(record["step"] > step for record in records(output))


def last(output: Path, name: str) -> float:
    return [record[name] for record in records(output) if name in record][-1]


def planned(output: Path, config: TrainConfig) -> list[tuple[int, list[int]]]:
    """What a log of all samples of all epochs is."""
    plan = batch_plan(ContrastiveSet.open(output / "dataset"), config.training)
    batches = batches_after(plan, 0, config.training.epochs)
    return [(step, sorted(batch.tolist())) for step, batch in enumerate(batches, 1)]


def test_training_ends_early_and_keeps_the_best(tmp_path: Path, tiny_encoder: Path, pairs: str) -> None:
    # A rate that rises for long: the model gets better, then falls apart.
    optimizer = {"learning_rate": 0.05, "average": 0.5}
    config = config_for(
        tmp_path / "run",
        tiny_encoder,
        pairs,
        training={"epochs": 400, "batch_size": 8, "dtype": "float32", "optimizer": optimizer},
        workers={"validate_every": 2, "checkpoint_every": 2, "patience": 2},
        guide=None,
    )
    model = main(config)
    values = json.loads((model / "manifest.json").read_text())["measurements"][METRIC]
    assert len(values) < 50
    best = max(values)
    assert all(value < best - 0.02 for value in (values[0], *values[-2:]))
    held_out = ContrastiveSet.open(tmp_path / "run" / "dataset" / "validation")
    kept = load_encoder(model, torch.device("cpu"), config.training)
    assert validation_score(kept, held_out, torch.float32) == pytest.approx(best, abs=0.01)
    (training,) = [stage for stage in stages(StatusConfig(directory=str(tmp_path))) if stage.kind == "train"]
    assert training.state == "done"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"guide": None}, "guide: none"),
        ({"teacher": "b"}, "teacher: 'b', but no objective"),
        ({"datasets": [{"path": "a"}, {"path": "b", "objective": LABELS}]}, "datasets.1.label: none; datasets.1.obj"),
        ({"datasets": [{"path": "a", "objective": TEACHER}]}, "teacher: none; datasets.0.objective"),
        ({"datasets": [{"path": "a", "objective": {}}]}, "guide: .*, but no objective"),
        ({"validation": [{"path": "a", "objective": {}}]}, "validation.0.objective: expected none"),
        ({"training": {"objective": {"distil": {"weight": 1.0}}}}, "teacher: none"),
        (
            {"training": {"objective": {"scores": {"margin_mse": 1.0}}}},
            "datasets.0.positive_scores: none; training.objective",
        ),
        (
            {
                "datasets": [{"path": "a", "positive_scores": "s"}],
                "training": {"objective": {"scores": {"divergence": 1.0}}},
            },
            "datasets.0.negatives: none; training.objective",
        ),
        ({"training": {"objective": {"cosent": {"weight": 1.0}}}}, "info_nce would contrast pairs of whatever label"),
        (
            {"training": {"objective": LABELS}},
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
    trained: Path, tmp_path: Path, tiny_encoder: Path, pairs: str, capsys: pytest.CaptureFixture[str]
) -> None:
    half = merge(MergeConfig(output=tmp_path / "half", models=[str(tiny_encoder), str(trained / "model")]))
    values = {
        "output": tmp_path / "found",
        "base": str(tiny_encoder),
        "models": [str(trained / "model"), str(tiny_encoder)],
        "method": "self_positioning",
        "probe": {
            "data": [
                {"path": pairs, "lang": "lang"},
                {"path": str(Path(pairs).with_name("graded.parquet")), "label": "score", "objective": LABELS},
            ],
            "held_out_share": 0.2,
            "batch_size": 16,
            "epochs": 3,
            "learning_rate": 0.1,
        },
    }
    found = merge_main(MergeConfig.model_validate(values))
    measured = json.loads((found / "manifest.json").read_text())["measurements"]
    weights = measured["weights"]
    # From a half towards the trained model, which is better on these pairs; the base's own task vector is nothing.
    assert weights[0] > 0.6
    note = json.loads((tmp_path / "found" / NOTE).read_text())
    assert (note["job"], note["stage"], note["finished"]) == ("merge", "position", True)
    assert weights[1] == 0.5
    held_out = measured["held_out"]
    assert held_out["metric"] == "validation_mean_of_mrr@10_and_spearman"
    names = [each["model"] for each in held_out["scores"]]
    assert names == ["base", values["models"][0], values["models"][1], "uniform merge", "found merge"]
    base, _, same, uniform, best = (each["datasets"] for each in held_out["scores"])
    assert base == same
    assert uniform != best
    assert best[0] > base[0]
    printed = capsys.readouterr().out
    assert "samples that the search did not see" in printed
    assert f"{best[0]:.4f}" in printed
    vectors = [SentenceTransformer(str(path), device="cpu").encode(["the cat"]) for path in (half, found)]
    assert all(np.isfinite(each).all() for each in vectors)


def test_models_that_do_not_fit_are_refused_by_name(
    tmp_path: Path, tiny_encoder: Path, tiny_xlmr: Path, embedded_teacher: Path
) -> None:
    with pytest.raises(ConfigError, match="pieces"):
        merge(MergeConfig(output=tmp_path / "merged", models=[str(tiny_encoder), str(embedded_teacher)]))
