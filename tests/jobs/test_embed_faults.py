"""Whatever is killed while a corpus is embedded: after a rerun every id is there once, its vector bit for bit."""

import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedlib.errors import ArtifactError
from jobs.embed import EmbedConfig, embed
from tests.jobs.processes import kill_ray_workers, killed_at_the_end, wait_for

# Processes of other jobs are killed in every run.
pytestmark = [pytest.mark.ray, pytest.mark.slow]
TRIALS = range(5)
REPOSITORY = Path(__file__).parents[2]
PART_ROWS, NUM_ROWS = 256, 256 * 40


@pytest.fixture(scope="module")
def corpus(tiny_texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("faults") / "corpus.parquet"
    texts = [f"{tiny_texts[row % len(tiny_texts)]} {row}" for row in range(NUM_ROWS)]
    pq.write_table(pa.table({"id": list(range(1000, 1000 + NUM_ROWS)), "text": texts}), path, row_group_size=1000)
    return path


def values(corpus: Path, output: Path, model: Path) -> dict[str, str]:
    paths = {"input": str(corpus), "output": str(output), "model": str(model)}
    return paths | {"backend": "torch-float32", "rows_per_part": str(PART_ROWS), "num_actors": "2"}


def run(corpus: Path, output: Path, model: Path) -> None:
    embed(EmbedConfig.model_validate(values(corpus, output, model)))


def table(output: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(path) for path in sorted(output.glob("part-*.parquet"))])


def num_parts(output: Path) -> int:
    return len(list(output.glob("part-*.parquet")))


@pytest.fixture(scope="module")
def undisturbed(ray_cluster: None, corpus: Path, tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed")
    run(corpus, output, tiny_encoder)
    assert table(output)["id"].to_pylist() == list(range(1000, 1000 + NUM_ROWS))
    return output


@pytest.mark.parametrize("trial", TRIALS)
def test_a_killed_encoder_is_started_again(
    undisturbed: Path, corpus: Path, tiny_encoder: Path, tmp_path: Path, trial: int
) -> None:
    killed: list[int] = []
    moment = random.Random(trial).randint(1, 20)

    def kill() -> None:
        wait_for(lambda: num_parts(tmp_path) >= moment, f"part {moment}")
        killed.extend(kill_ray_workers("EmbedPart"))

    watcher = threading.Thread(target=kill)
    watcher.start()
    run(corpus, tmp_path, tiny_encoder)
    watcher.join()
    assert killed, "no encoder was found to kill"
    assert table(tmp_path).equals(table(undisturbed))


@pytest.mark.parametrize("trial", TRIALS)
def test_a_killed_job_resumes(undisturbed: Path, corpus: Path, tiny_encoder: Path, tmp_path: Path, trial: int) -> None:
    moment = random.Random(trial).randint(1, 30)
    options = [word for key, value in values(corpus, tmp_path, tiny_encoder).items() for word in (f"--{key}", value)]
    with killed_at_the_end([sys.executable, str(REPOSITORY / "jobs" / "embed.py"), *options]):
        wait_for(lambda: num_parts(tmp_path) >= moment, f"part {moment}")
    assert not (tmp_path / "manifest.json").exists()
    kept = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("part-*.parquet")}
    run(corpus, tmp_path, tiny_encoder)
    assert table(tmp_path).equals(table(undisturbed))
    assert kept.items() <= {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("part-*.parquet")}.items()


@pytest.mark.parametrize("trial", TRIALS)  # two minutes each
def test_a_job_goes_on_without_a_node(
    undisturbed: Path, corpus: Path, tiny_encoder: Path, tmp_path: Path, trial: int
) -> None:
    moment = random.Random(trial).randint(1, 20)
    config = values(corpus, tmp_path, tiny_encoder) | {"num_actors": "4"}
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "tests.jobs.two_nodes", "embed", str(moment), json.dumps(config)]
    subprocess.run(command, cwd=REPOSITORY, env=environment, check=True, timeout=400)
    assert table(tmp_path).equals(table(undisturbed))


@pytest.fixture(params=TRIALS)
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file system of its own with room for some parts."""
    size = random.Random(request.param).randint(200, 600)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.decode().strip()}: a full disk is not tested")
    yield tmp_path
    subprocess.run(["umount", "--lazy", tmp_path], check=True)


def test_a_full_disk_loses_nothing(undisturbed: Path, corpus: Path, tiny_encoder: Path, small_disk: Path) -> None:
    with pytest.raises(ArtifactError, match=r"part-\d{6}\.parquet: could not be written: .*No space left on device"):
        run(corpus, small_disk, tiny_encoder)
    assert 0 < num_parts(small_disk) < NUM_ROWS // PART_ROWS
    subprocess.run(["mount", "-o", "remount,size=50m", small_disk], check=True)
    run(corpus, small_disk, tiny_encoder)
    assert table(small_disk).equals(table(undisturbed))
