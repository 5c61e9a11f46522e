"""Several jobs in a row: `python jobs/recipe.py jobs/runs/bangla_e5.yaml --paths pairs=pairs.parquet`.

A stage is a job with its values. `{name}` in a value is what the stage `name` makes, or a path given under `paths`. All
values are checked before the first stage runs. Each job skips what it has finished, so a recipe that was cut off, or
changed, is run again with the same command.
"""

from jobs.cli import run_job  # isort: skip (takes jobs/ off sys.path before any library is imported)

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from glob import glob
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field, ValidationError
from rich.console import Console
from rich.table import Table

from embedlib.config import Config
from embedlib.errors import ConfigError
from embedlib.storage import Store
from jobs.cli import describe
from jobs.runtime import artifacts_directory, connect, format_seconds

JobName = Literal["corpus", "distill", "embed", "bitext", "mine", "train", "merge", "evaluate"]
REFERENCE = re.compile(r"\{(\w+)\}")
STATE = "recipe.json"
FILES = (".parquet", ".jsonl", ".csv", ".txt")


class Job(NamedTuple):
    """A job that can be a stage; imported when a recipe has one, since some need extras, or seconds."""

    module: str
    config_name: str
    function: str
    product: str
    """Where below its output lies what later stages ask for."""
    witness: str = "manifest.json"
    """The file, by its path from the product, that is written when the stage makes something."""

    @property
    def config(self) -> type[Config]:
        """What it is configured with."""
        found: type[Config] = getattr(import_module(self.module), self.config_name)
        return found

    @property
    def run(self) -> Callable[[Any], Any]:
        """What does it, on the cluster joined before."""
        found: Callable[[Any], Any] = getattr(import_module(self.module), self.function)
        return found


JOBS: dict[JobName, Job] = {
    "corpus": Job("jobs.corpus", "BuildConfig", "main", "train", "../manifest.json"),
    "distill": Job("jobs.distill", "DistillConfig", "main", "student"),
    "embed": Job("jobs.embed", "EmbedConfig", "embed", "."),
    "bitext": Job("jobs.bitext", "BitextConfig", "main", "."),
    "mine": Job("jobs.mine", "MineConfig", "mine", "."),
    "train": Job("jobs.train", "TrainConfig", "main", "model"),
    "merge": Job("jobs.merge", "MergeConfig", "main", "model"),
    "evaluate": Job("jobs.evaluate", "EvaluateConfig", "main", ".", "report.json"),
}


class StageConfig(Config):
    """One job of a recipe."""

    job: JobName
    """Which."""
    values: dict[str, Any] = Field(default_factory=dict)
    """Its configuration, without `output`."""


class RecipeConfig(Config):
    """Stages by name, in the order in which they run."""

    output: Path
    """Directory of all stages; a relative one lies below $EMBEDLIB_ARTIFACTS, else below ./artifacts."""
    paths: dict[str, str] = Field(default_factory=dict)
    """Files and models by the name under which stages refer to them."""
    stages: dict[str, StageConfig] = Field(min_length=1)
    """What is done."""
    only: list[str] | None = None
    """Run these stages alone; those before them must be finished."""

    @property
    def directory(self) -> Path:
        """Where all stages lie."""
        return artifacts_directory() / self.output


class Stage(NamedTuple):
    """A stage whose references are resolved."""

    name: str
    job: Job
    config: Config
    after: list[str]
    """Stages whose products it takes."""


def resolve(config: RecipeConfig) -> list[Stage]:
    """All stages with their references resolved and their values checked; ConfigError names stage and key."""
    known = {name: str(user_path_of(value)) for name, value in config.paths.items()}
    stages: list[Stage] = []
    for name, stage in config.stages.items():
        if name in known:
            raise ConfigError(f"stages.{name}: the name is taken by paths or an earlier stage")
        job = JOBS[stage.job]
        output = config.directory / name
        after: list[str] = []
        values = replaced(stage.values, known, f"stages.{name}.values", after)
        try:
            checked = job.config.model_validate({"output": str(output)} | values)
        except ValidationError as error:
            raise ConfigError(f"stages.{name}.values: {describe(error)}") from error
        stages.append(Stage(name, job, checked, [each for each in dict.fromkeys(after) if each in config.stages]))
        known[name] = str((output / job.product).absolute())
    if unknown := sorted(set(config.only or []) - set(config.stages)):
        raise ConfigError(f"only: {unknown[0]!r} is no stage; expected of {list(config.stages)}")
    return stages


def replaced(value: Any, known: Mapping[str, str], key: str, used: list[str]) -> Any:
    """`value` with every `{name}` in it replaced; which names were, is added to `used`."""
    if isinstance(value, Mapping):
        return {name: replaced(each, known, f"{key}.{name}", used) for name, each in value.items()}
    if isinstance(value, list):
        return [replaced(each, known, f"{key}.{place}", used) for place, each in enumerate(value)]
    if not isinstance(value, str):
        return value

    def path_of(found: re.Match[str]) -> str:
        if found[1] not in known:
            raise ConfigError(f"{key}: {{{found[1]}}} is no path and no earlier stage; expected of {sorted(known)}")
        used.append(found[1])
        return known[found[1]]

    return REFERENCE.sub(path_of, value)


def user_path_of(value: str) -> str:
    """A path as the user means it: relative to where the recipe was started; ids of models stay as they are."""
    return str(Path(value).absolute()) if Store.at(value).is_local and Path(value).exists() else value


class Done(NamedTuple):
    """What became of a stage."""

    state: str
    seconds: float


def run_stages(config: RecipeConfig, stages: list[Stage]) -> Iterator[tuple[Stage, Done]]:
    """Run the stages in their order, and tell of each when it is finished."""
    for stage in stages:
        if config.only is not None and stage.name not in config.only:
            yield stage, Done("left out", 0.0)
            continue
        print(f"\n== {stage.name} ==", flush=True)
        product = config.directory / stage.name / stage.job.product / stage.job.witness
        before = product.stat().st_mtime_ns if product.exists() else None
        start = time.monotonic()
        stage.job.run(stage.config)
        after = product.stat().st_mtime_ns if product.exists() else None
        state = "was there" if before is not None and before == after else "made"
        yield stage, Done(state, time.monotonic() - start)


def require_files(config: RecipeConfig) -> None:
    """ConfigError for a path that names files and finds none: a stage would say so hours later."""
    for name, value in config.paths.items():
        is_file = Path(value).suffix in FILES or value.startswith(("/", "./", "../", "~"))
        if is_file and Store.at(value).is_local and not glob(str(Path(value).expanduser())):
            raise ConfigError(f"paths.{name}: {value!r} finds no file; expected one that there is")


def write_state(config: RecipeConfig, done: Mapping[str, Done]) -> None:
    """What became of the stages so far, beside them."""
    values = {name: each._asdict() for name, each in done.items()}
    (config.directory / STATE).write_text(json.dumps(values, indent=2) + "\n")


def table_of(stages: list[Stage], done: Mapping[str, Done]) -> Table:
    """The recipe as a graph: each stage, what it takes, and what became of it."""
    table = Table("stage", "takes", "state", "time")
    for stage in stages:
        state = done.get(stage.name, Done("waits", 0.0))
        took = format_seconds(state.seconds) if state.seconds else ""
        table.add_row(stage.name, ", ".join(stage.after) or "–", state.state, took)
    return table


def main(config: RecipeConfig) -> dict[str, Done]:
    """Check all stages, then run them; the table is printed whatever becomes of them."""
    stages = resolve(config)
    require_files(config)
    connect()
    config.directory.mkdir(parents=True, exist_ok=True)
    done: dict[str, Done] = {}
    try:
        for stage, state in run_stages(config, stages):
            done[stage.name] = state
            write_state(config, done)
    except Exception:
        failed = next(stage.name for stage in stages if stage.name not in done)
        done[failed] = Done("failed", 0.0)
        write_state(config, done)
        raise
    finally:
        Console(width=100).print(table_of(stages, done))
    return done


if __name__ == "__main__":
    run_job(RecipeConfig, main)
