"""Several jobs in a row: `python jobs/recipe.py jobs/runs/bangla_e5.yaml --paths pairs=pairs.parquet`.

A stage is a job with its values. `{name}` in a value is what the stage `name` makes, or a path given under `paths`. All
values, and the paths of the stages that run, are checked before the first of them runs. Each job skips what it has
finished, so a recipe that was cut off is run again with the same command. A stage whose values or inputs changed is
refused, with the names of both, until its directory is moved away. `recipe.json` has what became of each stage, and
what it was made with.
"""

from jobs.cli import run_job  # isort: skip (takes jobs/ off sys.path before any library is imported)

import re
import time
from collections.abc import Callable, Mapping, MutableMapping
from datetime import UTC, datetime
from glob import glob
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, ValidationError
from rich.console import Console
from rich.table import Table

from embedlib.artifact import fingerprint
from embedlib.config import Config
from embedlib.errors import ConfigError, EmbedlibError
from embedlib.storage import Store, user_path
from jobs.cli import describe
from jobs.runtime import artifacts_directory, connect, format_seconds

JobName = Literal["corpus", "compress", "distill", "embed", "bitext", "mine", "train", "merge", "evaluate"]
REFERENCE = re.compile(r"\{(\w+)\}")
Name = Annotated[str, Field(pattern=r"^\w+$")]
"""What `{name}` in a value can say."""
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
    "compress": Job("jobs.compress", "CompressJob", "main", "student_initial"),
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
    paths: dict[Name, str] = Field(default_factory=dict)
    """Files and models by the name under which stages refer to them, relative ones to where the command is typed;
    `{name}` in one is another of them."""
    stages: dict[Name, StageConfig] = Field(min_length=1)
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
    paths: list[str]
    """Paths that it takes."""
    witness: Path
    """The file that is there when it is finished."""
    mark: str
    """Fingerprint of its job and values, and of those of the stages that it takes."""


def resolve(config: RecipeConfig) -> list[Stage]:
    """All stages with their references resolved and their values checked; ConfigError names stage and key."""
    known = resolved_paths(config)
    # A recipe that was moved has the same values: in a fingerprint a stage stands by its name.
    named = dict(known)
    marks: dict[str, str] = {}
    stages: list[Stage] = []
    for name, stage in config.stages.items():
        if name in known:
            raise ConfigError(f"stages.{name}: the name is taken by paths or an earlier stage")
        job = JOBS[stage.job]
        output = config.directory / name
        used: list[str] = []
        key = f"stages.{name}.values"
        values = replaced(stage.values, known, key, used)
        if "output" in values:
            raise ConfigError(
                f"{key}.output: {values['output']!r}; expected none, a stage lies below the recipe's output"
            )
        try:
            checked = job.config.model_validate({"output": str(output)} | values)
        except ValidationError as error:
            raise ConfigError(f"{key}: {describe(error)}") from error
        after, paths = ([each for each in dict.fromkeys(used) if each in of] for of in (config.stages, config.paths))
        told = replaced(stage.model_dump(mode="json"), named, key, [])
        marks[name] = fingerprint(stage=told, takes=[marks[each] for each in after])
        stages.append(Stage(name, job, checked, after, paths, output / job.product / job.witness, marks[name]))
        known[name] = str((output / job.product).absolute())
        named[name] = f"{{{name}}}"
    if unknown := sorted(set(config.only or []) - set(config.stages)):
        raise ConfigError(f"only: {unknown[0]!r} is no stage; expected of {list(config.stages)}")
    return stages


def resolved_paths(config: RecipeConfig) -> dict[str, str]:
    """The paths by name, with those that others are made of in their place; ConfigError where one is made of itself."""
    parts: dict[str, list[str]] = {name: [] for name in config.paths}
    for name, value in config.paths.items():
        replaced(value, config.paths, f"paths.{name}", parts[name])
    known: dict[str, str] = {}
    try:
        for name in TopologicalSorter(parts).static_order():
            known[name] = user_path_of(replaced(config.paths[name], known, f"paths.{name}", []))
    except CycleError as error:
        made = " of ".join(f"{{{name}}}" for name in reversed(error.args[1]))
        raise ConfigError(f"paths.{error.args[1][0]}: {made}; expected no path that is made of itself") from error
    return known


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
    """A path as the user means it: relative to where the command was typed; ids of models stay as they are."""
    path = user_path(value)
    return path if glob(path) else value


class Done(NamedTuple):
    """What became of a stage."""

    state: str
    """waits, running, made, was there, left out, failed, or stopped by the user."""
    seconds: float = 0.0
    """What it took the last time it did not find its work done."""
    finished: str | None = None
    """When that was, in ISO 8601."""
    mark: str | None = None
    """Fingerprint of what it was made with; none: it was not, or before fingerprints were noted."""


def require_files(config: RecipeConfig, stages: list[Stage]) -> None:
    """ConfigError for a path of a stage that runs, names files and finds none: it would say so hours later.

    One that it is made of is held to account by it.
    """
    paths = resolved_paths(config)
    running = [stage for stage in stages if config.only is None or stage.name in config.only]
    for name in dict.fromkeys(name for stage in running for name in stage.paths):
        value = paths[name]
        below_another = "}/" in config.paths[name]
        is_file = below_another or Path(value).suffix in FILES or value.startswith(("/", "./", "../", "~"))
        if is_file and Store.at(value).is_local and not glob(user_path(value)):
            raise ConfigError(f"paths.{name}: {value!r} finds no file; expected one that there is")


def require_finished(config: RecipeConfig, stages: list[Stage], done: Mapping[str, Done]) -> None:
    """ConfigError where `only` leaves out a stage that another takes and that is not finished, or with other values."""
    alone = set(config.only or config.stages)
    finished = {stage.name for stage in stages if stage.witness.exists()}
    other = {stage.name for stage in stages if done[stage.name].mark not in (None, stage.mark)}
    for stage in stages:
        for name in sorted(set(stage.after) - alone) if stage.name in alone else []:
            if name not in finished:
                raise ConfigError(f"only: {stage.name!r} takes {name!r}, which is not finished; expected that, too")
            if name in other:
                raise ConfigError(
                    f"only: {stage.name!r} takes {name!r}, which was made with other values of its own or of what it "
                    "takes; expected those, or that, too"
                )


def run_stages(config: RecipeConfig, stages: list[Stage], done: MutableMapping[str, Done]) -> None:
    """Run the stages in their order, and note in `done` and on disk what becomes of each.

    An error of our own is raised again with the stage's name before it.
    """

    def note(stage: Stage, became: Done) -> None:
        done[stage.name] = became
        write_state(config, stages, done)

    for number, stage in enumerate(stages, 1):
        last = done[stage.name]
        if config.only is not None and stage.name not in config.only:
            note(stage, last._replace(state="left out"))
            continue
        print(f"\n== {stage.name}: {config.stages[stage.name].job}, {number} of {len(stages)} ==", flush=True)
        note(stage, last._replace(state="running"))
        before, start = written(stage.witness), time.monotonic()
        try:
            stage.job.run(stage.config)
        except BaseException as error:
            note(stage, now(last, "failed" if isinstance(error, Exception) else "stopped", start))
            if type(error).__module__ == EmbedlibError.__module__:
                raise type(error)(f"stages.{stage.name}: {error}") from error
            raise
        was_there = before is not None and before == written(stage.witness)
        became = last._replace(state="was there") if was_there else now(last, "made", start)
        note(stage, became._replace(mark=stage.mark))


def written(witness: Path) -> int | None:
    """When a file was last written, in ns; none where there is none."""
    return witness.stat().st_mtime_ns if witness.exists() else None


def now(last: Done, state: str, start: float) -> Done:
    """The state that a stage came to just now; `start` is a reading of the monotonic clock."""
    finished = datetime.now(UTC).isoformat(timespec="seconds")
    return last._replace(state=state, seconds=time.monotonic() - start, finished=finished)


def read_state(config: RecipeConfig) -> dict[str, Done]:
    """All stages as they wait, with what they took and were made with when they were last run."""
    try:
        known = (Store.at(str(config.directory)) / STATE).read_json() or {}
    except ValueError:  # what it says is of help, and can be done without
        known = {}
    last = {name: known.get(name, {}) for name in config.stages}
    return {
        name: Done("waits", each.get("seconds", 0.0), each.get("finished"), each.get("mark"))
        for name, each in last.items()
    }


def write_state(config: RecipeConfig, stages: list[Stage], done: Mapping[str, Done]) -> None:
    """What became of the stages so far, what they are and what they take, beside them."""
    values = {
        stage.name: {"job": config.stages[stage.name].job, "takes": stage.after} | done[stage.name]._asdict()
        for stage in stages
    }
    (Store.at(str(config.directory)) / STATE).write_json(values)


def table_of(config: RecipeConfig, stages: list[Stage], done: Mapping[str, Done]) -> Table:
    """The recipe as a graph: each stage, what it takes, and what became of it."""
    table = Table("stage", "job", "takes", "state", "time", "finished")
    for stage in stages:
        state, seconds, finished, _ = done[stage.name]
        when = datetime.fromisoformat(finished).astimezone().strftime("%Y-%m-%d %H:%M") if finished else ""
        took = format_seconds(seconds) if seconds else ""
        job = config.stages[stage.name].job
        table.add_row(stage.name, job, ", ".join(stage.after) or "–", state, took, when)
    return table


def main(config: RecipeConfig) -> dict[str, Done]:
    """Check all stages, then run them; the table is printed whatever becomes of them."""
    stages = resolve(config)
    require_files(config, stages)
    done = read_state(config)
    require_finished(config, stages, done)
    connect()
    config.directory.mkdir(parents=True, exist_ok=True)
    try:
        run_stages(config, stages, done)
    finally:
        Console(width=100).print(table_of(config, stages, done))
    return done


if __name__ == "__main__":
    run_job(RecipeConfig, main)
