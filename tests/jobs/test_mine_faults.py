"""Whatever is killed while negatives are mined: in the end they are those of an undisturbed run."""

import json
import os
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.mine import MineConfig, mine
from tests.jobs.processes import kill_ray_workers, killed_at_the_end, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.slow]
REPOSITORY = Path(__file__).parents[2]
NUM_TEXTS, NUM_QUERIES, BLOCK = 6000, 2000, 50


@pytest.fixture(scope="module")
def files(tiny_texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("faults")
    texts = [f"{tiny_texts[row % len(tiny_texts)]} {row}" for row in range(NUM_TEXTS)]
    pq.write_table(pa.table({"id": range(NUM_TEXTS), "text": texts}), folder / "corpus.parquet")
    queries = [text.upper() for text in texts[:NUM_QUERIES]]
    pq.write_table(pa.table({"query": queries, "positive": texts[-NUM_QUERIES:]}), folder / "pairs.parquet")
    return {"pairs": str(folder / "pairs.parquet"), "corpus": str(folder / "corpus.parquet")}


@pytest.fixture(scope="module", params=["exact", "IVF64,Flat"])
def index(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def undisturbed(
    ray_cluster: None, files: dict[str, str], tiny_encoder: Path, index: str, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    output = tmp_path_factory.mktemp("mined") / "undisturbed"
    mine(MineConfig.model_validate(values(files, output, tiny_encoder, index)))
    assert num_parts(output) == NUM_QUERIES // BLOCK
    return output


@pytest.fixture
def output(undisturbed: Path, tmp_path: Path) -> Path:
    """A directory where everything is embedded, and nothing mined."""
    shutil.copytree(undisturbed / "work" / "vectors", tmp_path / "mined" / "work" / "vectors")
    return tmp_path / "mined"


def values(files: dict[str, str], output: Path, model: Path, index: str) -> dict[str, Any]:
    search = {"shards": 2, "index": index}
    return files | {
        "output": str(output),
        "model": str(model),
        "backend": "torch-float32",
        "rule": {"max_negatives": 4, "relative_margin": 0.01},
        "search": search,
        "queries_per_block": BLOCK,
    }


def table(output: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(path) for path in sorted(output.glob("part-*.parquet"))])


def num_parts(output: Path) -> int:
    return len(list(output.glob("part-*.parquet")))


@pytest.mark.parametrize("process", ["IndexShard", "Miner"])
@pytest.mark.parametrize("trial", range(5))
def test_a_killed_process_is_started_again(
    undisturbed: Path, output: Path, files: dict[str, str], tiny_encoder: Path, index: str, process: str, trial: int
) -> None:
    killed: list[int] = []
    moment = random.Random(trial).randint(1, 30)

    def kill() -> None:
        wait_for(lambda: num_parts(output) >= moment, f"part {moment}")
        killed.extend(kill_ray_workers(process))

    killer = threading.Thread(target=kill)
    killer.start()
    mine(MineConfig.model_validate(values(files, output, tiny_encoder, index)))
    killer.join()
    assert killed, f"no {process} was found to kill"
    assert table(output).equals(table(undisturbed))


@pytest.mark.parametrize("trial", range(7))
def test_a_killed_job_resumes(
    undisturbed: Path, output: Path, files: dict[str, str], tiny_encoder: Path, index: str, trial: int
) -> None:
    moment = random.Random(trial).randint(1, 30)
    config = values(files, output, tiny_encoder, index)
    options = [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in config.items()]
    with killed_at_the_end([sys.executable, str(REPOSITORY / "jobs" / "mine.py"), *options]):
        wait_for(lambda: num_parts(output) >= moment, f"part {moment}")
    assert not (output / "manifest.json").exists()
    kept = {path.name: path.stat().st_mtime_ns for path in output.glob("part-*.parquet")}
    mine(MineConfig.model_validate(config))
    assert table(output).equals(table(undisturbed))
    assert kept.items() <= {path.name: path.stat().st_mtime_ns for path in output.glob("part-*.parquet")}.items()


@pytest.mark.parametrize("trial", range(3))
def test_mining_goes_on_without_a_node(
    undisturbed: Path, output: Path, files: dict[str, str], tiny_encoder: Path, index: str, trial: int
) -> None:
    moment = random.Random(trial).randint(1, 30)
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    config = json.dumps(values(files, output, tiny_encoder, index))
    command = [sys.executable, "-m", "tests.jobs.two_nodes", "mine", str(moment), config]
    subprocess.run(command, cwd=REPOSITORY, env=environment, check=True, timeout=400)
    assert table(output).equals(table(undisturbed))
