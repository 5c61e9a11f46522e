"""Whatever is killed while a corpus is built: after a rerun the same bytes."""

import json
import random
import sys
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from jobs.corpus import BuildConfig, build_corpus
from tests.jobs.processes import kill_ray_workers, killed_at_the_end, wait_for
from tests.jobs.test_corpus_job import content, sentence

pytestmark = [pytest.mark.ray, pytest.mark.slow]
REPOSITORY = Path(__file__).parents[2]


def values(source: Path, output: Path) -> dict[str, object]:
    sizes = {"rows_per_part": 500, "rows_per_partition": 1000, "rows_per_shard": 700}
    return {"output": str(output), "sources": [{"name": "s", "path": str(source)}], "num_workers": 2} | sizes


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("faults") / "rows.parquet"
    texts = [sentence(number % 18_000) for number in range(20_000)]
    pq.write_table(pa.table({"text": texts, "lang": ["en"] * len(texts)}), path, row_group_size=500)
    return path


@pytest.fixture(scope="module")
def undisturbed(ray_cluster: None, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    manifest = build_corpus(BuildConfig.model_validate(values(source, output)))
    assert manifest.measurements["reasons"] == {"duplicate": 2000}
    return output


def num_files(output: Path) -> int:
    return sum(1 for _ in output.rglob("part-*"))


@pytest.mark.parametrize("trial", range(10))
def test_a_killed_worker_does_not_show(undisturbed: Path, source: Path, tmp_path: Path, trial: int) -> None:
    moment = random.Random(trial).randint(1, 60)
    killed: list[int] = []

    def kill() -> None:
        wait_for(lambda: num_files(tmp_path) >= moment, f"file {moment}")
        # A worker bears its task's name while it is at it, which is not for long.
        wait_for(has_struck, "a worker at work")

    def has_struck() -> bool:
        killed.extend(kill_ray_workers("MapBatches"))
        return bool(killed)

    watcher = threading.Thread(target=kill)
    watcher.start()
    build_corpus(BuildConfig.model_validate(values(source, tmp_path / "out")))
    watcher.join()
    assert killed
    assert content(tmp_path / "out") == content(undisturbed)


@pytest.mark.parametrize("trial", range(10))
def test_a_killed_job_resumes(undisturbed: Path, source: Path, tmp_path: Path, trial: int) -> None:
    moment = random.Random(trial).randint(1, 60)
    run = tmp_path / "run.yaml"
    run.write_text(yaml.safe_dump(json.loads(json.dumps(values(source, tmp_path / "out")))))
    with killed_at_the_end([sys.executable, str(REPOSITORY / "jobs" / "corpus.py"), str(run)]):
        wait_for(lambda: num_files(tmp_path) >= moment, f"file {moment}")
    assert not (tmp_path / "out" / "manifest.json").exists()
    build_corpus(BuildConfig.model_validate(values(source, tmp_path / "out")))
    assert content(tmp_path / "out") == content(undisturbed)
