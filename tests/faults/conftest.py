"""What the suite is asked for, the files of its jobs, their undisturbed results, and the report.

    python -m pytest tests/faults --trials 20 --seed 1 [--jobs embed,mine] [--faults worker,node] [--report faults.json]

Without --trials nothing runs. A run has some three trials; `-n 2` does two at a time.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filelock import FileLock

from embedlib.schemas import CORPUS
from tests.conftest import corpus_rows
from tests.faults.draw import draw
from tests.faults.report import RESULTS, show, summary
from tests.faults.work import JOBS, vocabulary_of

REPOSITORY = Path(__file__).resolve().parents[2]
NUM_TEXTS, NUM_MINED, NUM_QUERIES = 10_240, 6000, 2000
VARIANTS = 24


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("faults")
    group.addoption("--trials", type=int, default=0, help="how many faults; each run of a job has three or four")
    group.addoption("--seed", type=int, default=0, help="decides jobs, faults and moments")
    group.addoption("--jobs", default="", help="comma-separated; none: all")
    group.addoption("--faults", default="", help="comma-separated; none: all")
    group.addoption("--report", type=Path, help="where to write trials, losses and recovery times")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "drawn" in metafunc.fixturenames:
        option = metafunc.config.getoption
        chosen = [set(filter(None, option(name, "").split(","))) for name in ("--jobs", "--faults")]
        plans = draw(option("--trials", 0), option("--seed", 0), *chosen)
        names = ["-".join([str(plan.number), plan.job, *(strike.fault for strike in plan.strikes)]) for plan in plans]
        metafunc.parametrize("drawn", plans, ids=names)


@pytest.fixture(scope="session")
def files(tiny_encoder: Path, tiny_texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Paths by name."""
    folder = tmp_path_factory.mktemp("files")
    texts = [f"{tiny_texts[row % len(tiny_texts)]} {row}" for row in range(NUM_TEXTS)]
    pq.write_table(pa.table({"id": range(NUM_TEXTS), "text": texts}), folder / "corpus.parquet", row_group_size=1000)
    copies = [*texts, *texts[::10]]
    pq.write_table(pa.table({"id": range(len(copies)), "text": copies}), folder / "copies.parquet")
    queries = [text.upper() for text in texts[:NUM_QUERIES]]
    answers = texts[NUM_MINED - NUM_QUERIES : NUM_MINED]
    pq.write_table(pa.table({"query": queries, "positive": answers}), folder / "pairs.parquet")
    rows = corpus_rows()
    english, german = ([row["text"] for row in rows if row["lang"] == lang] for lang in ("en", "de"))
    pq.write_table(pa.table({"query": english, "positive": german}), folder / "translations.parquet")
    many = [
        row
        | {"id": len(rows) * number + row["id"], "text": f"{row['text']} {number}", "group": 24 * number + row["group"]}
        for number in range(VARIANTS)
        for row in rows
    ]
    pq.write_table(pa.Table.from_pylist(many, schema=CORPUS), folder / "many_sentences.parquet")
    made = {
        name: str(folder / f"{name}.parquet")
        for name in ("corpus", "copies", "pairs", "translations", "many_sentences")
    }
    vocabulary = str(vocabulary_of(tiny_encoder))
    return made | {"model": str(tiny_encoder), "vocabulary": vocabulary}


@pytest.fixture(scope="session")
def undisturbed(files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """What a job makes when nothing happens, made once a session, also of several processes."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def of(job: str) -> Path:
        folder = root / f"undisturbed-{job}"
        with FileLock(f"{folder}.lock"):
            if job in JOBS and not (folder / "done").exists():
                folder.mkdir(exist_ok=True)
                (folder / "values.json").write_text(json.dumps(JOBS[job].values(files, folder / "output")))
                environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_ADDRESS")}
                command = [sys.executable, "-m", "tests.faults.drive", job, str(folder / "values.json")]
                subprocess.run(command, cwd=REPOSITORY, env=environment, check=True, timeout=600)
                (folder / "done").touch()
        return folder / "output"

    return of


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Of trials side by side (`-n`), each process hands what it found to the one that reports."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["runs"] = RESULTS


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    RESULTS.extend(getattr(node, "workeroutput", {}).get("runs", []))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not RESULTS:
        return
    show(RESULTS, terminalreporter.write_line)
    if path := config.getoption("--report", None):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(summary(RESULTS), indent=2) + "\n")
