"""`python jobs/x.py` puts jobs/ first on the path; no file there may take the place of a library."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
RUNNABLE = sorted(path for path in (REPOSITORY / "jobs").glob("*.py") if '__name__ == "__main__"' in path.read_text())
# What transformers, sentence-transformers, Ray and the standard library look for.
SHADOWS = ("evaluate", "datasets", "torch", "ray", "transformers", "numpy", "tokenizers", "json", "logging", "queue")


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages alone, and in jobs/ files called like libraries that must never run."""
    directory = tmp_path_factory.mktemp("copied")
    for package in ("embedlib", "jobs"):
        shutil.copytree(REPOSITORY / package, directory / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in SHADOWS:
        (directory / "jobs" / f"{name}.py").write_text("raise RuntimeError(f'{__file__} was imported')\n")
    return directory


def run(script: Path, *arguments: str, where: Path, on_path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run `script` elsewhere, with nothing but `on_path` to find packages by."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if on_path:
        environment["PYTHONPATH"] = str(on_path)
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True, check=False)


def assert_help(found: subprocess.CompletedProcess[str], job: Path) -> None:
    assert found.returncode == 0, found.stderr
    assert "was imported" not in found.stderr + found.stdout
    assert f"jobs/{job.name}" in found.stdout


@pytest.mark.parametrize(
    "job",
    # The main job imports what the others import, which is most of the time this takes.
    [pytest.param(path, marks=[] if path.name == "distill.py" else pytest.mark.slow) for path in RUNNABLE],
    ids=lambda path: path.name,
)
def test_no_file_in_jobs_shadows_a_library(copied: Path, tmp_path: Path, job: Path) -> None:
    assert_help(run(copied / "jobs" / job.name, "--help", where=tmp_path, on_path=copied), job)


def test_the_shadows_would_be_met_otherwise(copied: Path, tmp_path: Path) -> None:
    (copied / "jobs" / "careless.py").write_text("import evaluate\n")
    found = run(copied / "jobs" / "careless.py", where=tmp_path)
    assert found.returncode == 1
    assert "evaluate.py was imported" in found.stderr


def test_the_path_names_the_repository_and_not_jobs(copied: Path, tmp_path: Path) -> None:
    (copied / "jobs" / "careful.py").write_text("import jobs.cli, sys\nprint(*sys.path, sep='\\n')\n")
    found = run(copied / "jobs" / "careful.py", where=tmp_path, on_path=copied)
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    assert str(copied) in lines
    assert str(copied / "jobs") not in lines


@pytest.mark.parametrize("job", RUNNABLE, ids=lambda path: path.name)
def test_a_job_imports_jobs_before_anything_else(job: Path) -> None:
    imports = [node for node in ast.walk(ast.parse(job.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)]
    first = min(imports, key=lambda node: node.lineno)
    assert isinstance(first, ast.ImportFrom)
    assert (first.module or "").partition(".")[0] == "jobs"


def test_every_job_is_checked() -> None:
    assert {"distill.py", "embed.py"} <= {path.name for path in RUNNABLE}


@pytest.mark.parametrize("job", ["embed", "mine", "bitext", "index"])
def test_drivers_that_compute_no_vectors_do_without_pytorch(job: str, tmp_path: Path) -> None:
    script = tmp_path / "driver.py"
    script.write_text(
        f"import sys, jobs.{job}\n"
        "from embedlib.encoder import fast_arithmetic\n"
        "print(fast_arithmetic('cpu'), [name for name in ('torch', 'transformers') if name in sys.modules])\n"
    )
    found = run(script, where=tmp_path, on_path=REPOSITORY)
    assert found.stdout.split(" ", 1)[1].strip() == "[]", found.stdout + found.stderr
