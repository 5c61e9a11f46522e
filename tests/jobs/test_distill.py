"""The main job on a real local cluster with a tiny teacher: stages, resume, and processes killed at random steps."""

import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from sentence_transformers import SentenceTransformer

from embedlib.dataset import DistillationSet
from embedlib.errors import ArtifactError
from jobs.distill import DistillConfig, main
from tests.jobs.processes import kill_ray_workers, killed_at_the_end, wait_for

pytestmark = pytest.mark.ray

REPOSITORY = Path(__file__).parents[2]
WORDS = {
    lang: words.split()
    for lang, words in {
        "en": "the open door of a small house near the river and an old green garden",
        "de": "die offene Tür eines kleinen Hauses am Fluss und ein alter grüner Garten",
        "ru": "открытая дверь маленького дома у реки и старый зелёный сад",
    }.items()
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    rng = random.Random(0)
    with path.open("w") as file:
        for group in range(250):
            for lang, words in WORDS.items():
                text = " ".join(rng.choice(words) for _ in range(rng.randint(3, 9)))
                file.write(json.dumps({"text": text, "lang": lang, "group": group}) + "\n")
    return path


def values_for(output: Path, teacher: Path, corpus: Path) -> dict[str, Any]:
    """Half of a tiny teacher's layers, and all its pieces."""
    return {
        "output": output,
        "teacher": str(teacher),
        "corpus": {"path": str(corpus), "validation_share": 0.1, "held_out_share": 0.2},
        "compression": {
            "layers": {"num_layers": 2, "probe_texts": 32},
            "vocabulary": {"size": vocabulary_size(teacher)},
        },
    }


def config_for(output: Path, teacher: Path, corpus: Path, **workers: Any) -> DistillConfig:
    return DistillConfig.model_validate(
        values_for(output, teacher, corpus)
        | {
            "distillation": {"epochs": 4, "batch_size": 5, "optimizer": {"learning_rate": 1e-3}},
            "workers": {"validate_every": 50, "checkpoint_every": 20, **workers},
            "plots": False,
        }
    )


def vocabulary_size(teacher: Path) -> int:
    """All the pieces that the tiny teacher can keep, and the bytes."""
    tokenizer = json.loads((teacher / "tokenizer.json").read_text())
    names = {piece for piece, _ in tokenizer["model"]["vocab"]}
    return len(names - {"<mask>"}) + 256


def sample_log(output: Path) -> list[tuple[int, list[int]]]:
    """(step, ids over all workers, sorted) in the order of the log's steps."""
    steps: dict[int, list[int]] = {}
    for path in output.glob("training/*/log/samples-*.jsonl"):
        seen = set()
        for line in path.read_text().splitlines():
            record = json.loads(line)
            assert record["step"] not in seen, "a step is logged twice by one worker"
            seen.add(record["step"])
            steps.setdefault(record["step"], []).extend(record["ids"])
    return [(step, sorted(ids)) for step, ids in sorted(steps.items())]


def last_loss(output: Path) -> float:
    (path,) = output.glob("training/*/log/history.jsonl")
    return float([json.loads(line)["loss"] for line in path.read_text().splitlines() if "loss" in line][-1])


def current_step(output: Path) -> int:
    for path in output.glob("training/*/log/history.jsonl"):
        lines = path.read_text().splitlines()
        if lines:
            return int(json.loads(lines[-1])["step"])
    return 0


def wait_for_step(output: Path, step: int) -> None:
    wait_for(lambda: current_step(output) >= step, f"step {step}")


def assert_every_sample_once_an_epoch(output: Path, epochs: int = 4) -> None:
    log = sample_log(output)
    num_samples = len(DistillationSet.open(output / "dataset"))
    per_epoch = num_samples // 5
    assert [step for step, _ in log] == list(range(1, per_epoch * epochs + 1))
    for epoch in range(epochs):
        ids = [i for _, step_ids in log[epoch * per_epoch : (epoch + 1) * per_epoch] for i in step_ids]
        assert sorted(ids) == list(range(num_samples))


@pytest.fixture(scope="module")
def undisturbed(ray_cluster: None, tiny_encoder: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed")
    main(config_for(output, tiny_encoder, corpus))
    return output


def test_the_run_leaves_a_student_and_a_report(undisturbed: Path) -> None:
    report = json.loads((undisturbed / "report.json").read_text())
    assert report["student"]["unk_rate"] == 0.0
    assert report["fidelity"]["cosine"] > report["fidelity_initial"]["cosine"]
    assert set(report["bitext"]["student"]) == {"de", "ru"}
    assert report["size"]["ratio"] > 1
    student = SentenceTransformer(str(undisturbed / "student"), device="cpu")
    assert student.encode("the open door", prompt_name="query").shape == (report["student"]["embedding_dim"],)
    assert "http" not in (undisturbed / "report.html").read_text().replace("http://www.w3.org", "")


def test_every_sample_is_seen_once_an_epoch(undisturbed: Path) -> None:
    assert_every_sample_once_an_epoch(undisturbed)


def test_a_second_run_does_nothing_again(undisturbed: Path, tiny_encoder: Path, corpus: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*") if path.is_file()}
    main(config_for(undisturbed, tiny_encoder, corpus))
    after = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*") if path.is_file()}
    assert after == before


def test_another_configuration_is_refused(undisturbed: Path, tiny_encoder: Path, corpus: Path) -> None:
    changed = config_for(undisturbed, tiny_encoder, corpus).model_copy(update={"seed": 1})
    with pytest.raises(ArtifactError, match=r"corpus: holds corpus \w{12}, but this run makes \w{12}"):
        main(changed)


@pytest.mark.slow  # the killed job below resumes from the same checkpoints
def test_a_killed_worker_changes_nothing(
    ray_cluster: None, undisturbed: Path, tiny_encoder: Path, corpus: Path, tmp_path: Path
) -> None:
    total = len(sample_log(undisturbed))
    step = random.Random(os.getpid()).randint(total // 10, total // 2)
    killed: list[int] = []

    def kill_worker() -> None:
        wait_for_step(tmp_path, step)
        killed.extend(kill_ray_workers("TrainWorker"))

    watcher = threading.Thread(target=kill_worker)
    watcher.start()
    main(config_for(tmp_path, tiny_encoder, corpus))
    watcher.join()
    assert killed, "no worker was found to kill"
    assert_every_sample_once_an_epoch(tmp_path)
    assert sample_log(tmp_path) == sample_log(undisturbed)
    assert last_loss(tmp_path) == pytest.approx(last_loss(undisturbed), rel=0.01)


@pytest.mark.slow
def test_a_killed_job_resumes_with_another_number_of_workers(
    undisturbed: Path, tiny_encoder: Path, corpus: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run.yaml"
    output = tmp_path / "out"
    run.write_text(yaml.safe_dump(config_for(output, tiny_encoder, corpus).model_dump(mode="json", exclude_none=True)))
    command = [sys.executable, str(REPOSITORY / "jobs" / "distill.py"), str(run)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_ADDRESS")}
    total = len(sample_log(undisturbed))
    with killed_at_the_end(command):
        wait_for_step(output, random.Random(os.getpid()).randint(total // 10, total // 4))
    assert not (output / "student").exists()
    subprocess.run([*command, "--workers.num_workers", "2"], env=environment, check=True, stdout=subprocess.DEVNULL)
    assert_every_sample_once_an_epoch(output)
    assert sample_log(output) == sample_log(undisturbed)
    assert last_loss(output) == pytest.approx(last_loss(undisturbed), rel=0.01)


def test_the_report_compares_the_same_texts(undisturbed: Path) -> None:
    report = json.loads((undisturbed / "report.json").read_text())
    scores = np.array([list(report["bitext"][model].values()) for model in ("teacher", "student")])
    assert ((scores >= 0) & (scores <= 1)).all()
