"""The image: hadolint, what it copies, what it runs as, and the same versions as everywhere."""

import re
import subprocess
import tomllib
from fnmatch import fnmatch

import yaml

from tests.cluster.conftest import CLUSTER, REPOSITORY

DOCKERFILE = (CLUSTER / "Dockerfile").read_text()


def test_hadolint_finds_nothing() -> None:
    subprocess.run(["hadolint", "--failure-threshold", "info", CLUSTER / "Dockerfile"], check=True)


def stages() -> dict[str, str]:
    """The text of each stage by its name."""
    parts = re.split(r"^FROM (\S+) AS (\S+)$", DOCKERFILE, flags=re.MULTILINE)
    return {name: f"FROM {base}\n{text}" for base, name, text in zip(*[iter(parts[1:])] * 3, strict=True)}


def test_what_is_copied_is_there_and_in_the_context() -> None:
    kept = [line[1:] for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [
        word
        for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, flags=re.MULTILINE)
        for word in line.split()[:-1]
        if not word.startswith("--")
    ]
    assert len(copied) >= 8
    for path in copied:
        assert (REPOSITORY / path).exists(), path
        assert any(fnmatch(path, pattern) for pattern in kept), f"{path} is not in the context"


def test_the_environment_is_copied_and_not_laid_over_another() -> None:
    """The build of an image with a venv in both had files of two versions of setuptools."""
    found = stages()
    assert "python -m venv /opt/embedlib" in found["libraries"]
    for below in ("base", "runtime"):
        assert "venv" not in found[below]
    for target in ("cpu", "cuda"):
        assert f"COPY --from=libraries-{target} /opt/embedlib /opt/embedlib" in found[target]


def test_both_targets_run_as_nobody_in_particular_and_know_whether_they_are_well() -> None:
    found = stages()
    for target in ("cpu", "cuda"):
        assert found[target].startswith("FROM runtime\n")
        assert "USER 1000:1000" in found[target]
    assert "HEALTHCHECK" in found["runtime"]
    assert "RAY_AUTH_MODE=token" in found["runtime"]
    assert "TOKEN=" not in DOCKERFILE


def test_versions_are_pinned_and_one() -> None:
    lock = (REPOSITORY / "requirements.lock").read_text()
    torch = re.search(r"^torch==(\S+)$", lock, flags=re.MULTILINE)
    ray = re.search(r"^ray==(\S+)$", lock, flags=re.MULTILINE)
    assert torch
    assert ray
    assert f"torch=={torch[1]}+cpu" in DOCKERFILE
    assert DOCKERFILE.count("--constraint requirements.lock") == DOCKERFILE.count("pip install")
    for line in re.findall(r"^FROM (\S+)", DOCKERFILE, flags=re.MULTILINE):
        assert line in stages() or re.fullmatch(r"python:\d+\.\d+\.\d+-slim-\w+", line), line
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for named in re.findall(r'"\.\[([\w,]+)\]"', DOCKERFILE):
        assert set(named.split(",")) <= extras.keys()
    for path in (CLUSTER / "kuberay").rglob("*.yaml"):
        assert set(re.findall(r"rayVersion: (\S+)", path.read_text())) <= {ray[1]}, path


def test_the_image_has_what_every_job_imports() -> None:
    named = re.findall(r'"\.\[([\w,]+)\]"', DOCKERFILE)
    assert len(named) == 2
    for extras in named:
        # A corpus is built with the first, reports are drawn with the second, `ray up` asks clouds with the third, and
        # a tracking server is told with the last.
        assert {"corpus", "demo", "cloud", "serve", "mlflow"} <= set(extras.split(","))


def test_ray_up_finds_its_programs_and_keeps_what_jobs_make() -> None:
    runtime = stages()["runtime"]
    assert "openssh-client rsync" in runtime
    assert "PATH=/opt/embedlib/bin:$PATH' >/etc/profile.d" in runtime  # its shells are login shells
    for path in (CLUSTER / "ray-up").glob("*.yaml"):
        values = yaml.safe_load(path.read_text())
        assert any("EMBEDLIB_ARTIFACTS=/shared/" in option for option in values["docker"]["run_options"]), path


def test_the_same_image_everywhere() -> None:
    version = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
    images = yaml.safe_load((CLUSTER / "kuberay" / "components" / "images" / "kustomization.yaml").read_text())[
        "images"
    ]
    assert {image["newTag"] for image in images} == {f"{version}-cpu", f"{version}-cuda"}
    for path in (CLUSTER / "ray-up").glob("*.yaml"):
        assert yaml.safe_load(path.read_text())["docker"]["image"] == f"{images[1]['newName']}:{images[1]['newTag']}"
