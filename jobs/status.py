"""What runs have made, are making or have left unfinished: `python jobs/status.py [artifacts | s3://bucket/artifacts]`.

It reads what lies in that directory alone: manifests, the notes that running jobs leave, and recipe.json. So it needs
no cluster and tells of dead ones, too.
"""

from jobs.cli import run_job  # isort: skip (takes jobs/ off sys.path before any library is imported)

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from pyarrow.fs import FileInfo, FileType
from pydantic import Field
from rich.console import Console
from rich.table import Table

from embedlib.artifact import MANIFEST_NAME
from embedlib.config import Config
from embedlib.errors import DataError
from embedlib.storage import Store, user_path
from jobs.metrics import MAX_RUN_ID, NOTE
from jobs.parts import CLAIM, is_part
from jobs.runtime import artifacts_directory, format_seconds

STATE = "recipe.json"
RECIPE_STATES = {"made": "done", "was there": "done", "running": "begun"}
# Below these lie parts and checkpoints, many files and no stages.
SKIPPED = {"ray", "log", "converted", "quarantine", "judged"}


def usual_directory() -> str:
    """Where jobs keep their output."""
    return str(artifacts_directory())


class StatusConfig(Config):
    """Which runs."""

    directory: str = Field(default_factory=usual_directory)
    """Directory of runs, here or in an object store; none: $EMBEDLIB_ARTIFACTS, else ./artifacts."""
    silent_s: float = Field(default=120.0, gt=0)
    """A run that has left no word for so long has stopped: while its process lives it does so every few seconds."""


class Stage(NamedTuple):
    """A directory that a job made or makes."""

    path: str
    """Relative to the directory of runs."""
    kind: str
    run: str
    """Beginning of the fingerprint of what is made."""
    state: str
    """done, running, stopped, or begun: claimed by a job that has told nothing yet; of a recipe's stage also waits,
    failed and left out; of a recipe running, failed, or idle where no stage of it runs."""
    share: float | None
    seconds_left: float | None
    note: str
    changed: datetime


class Place(NamedTuple):
    """A directory that may be a stage."""

    name: str
    """Relative to the directory of runs."""
    store: Store
    files: Mapping[str, FileInfo]
    """By name."""

    def read(self, name: str) -> dict[str, Any] | None:
        """A JSON file's mapping; None where there is none, or somebody else's."""
        if name not in self.files:
            return None
        try:
            value = json.loads((self.store / name).read())
        except (OSError, ValueError):  # gone since, or not JSON
            return None
        return value if isinstance(value, dict) else None

    def changed(self, name: str) -> datetime:
        """When one of the files was last written."""
        return datetime.fromtimestamp(self.files[name].mtime_ns / 1e9, UTC)


def stages(config: StatusConfig) -> list[Stage]:
    """All that lies below the directory, in the order in which it was touched last; DataError where there is none."""
    root = Store.at(user_path(config.directory))
    try:
        found = list(read_stages(root, config)) if root.info.type == FileType.Directory else None
    except OSError as error:
        raise DataError(f"directory: {root}: cannot be read: {error}") from error
    if found is None:
        raise DataError(f"directory: {root} is no directory")
    return sorted(found, key=lambda stage: stage.changed)


def read_stages(root: Store, config: StatusConfig) -> Iterator[Stage]:
    """The stages below a directory, and then the recipes that they are stages of."""
    recipes: dict[str, tuple[Place, dict[str, Any]]] = {}
    found: list[Stage] = []
    for store, files in root.walk(lambda name: not name.startswith(".") and name not in SKIPPED):
        place = Place(store.path.removeprefix(root.path.rstrip("/")).strip("/") or ".", store, files)
        if recipe := place.read(STATE):
            recipes[place.name] = place, recipe
        above, _, name = place.name.rpartition("/")
        _, recipe = recipes.get(above or ".", (place, {}))
        if stage := read_stage(place, config, recipe.get(name, {})):
            found.append(stage)
    told = {stage.path: stage for place, recipe in recipes.values() for stage in told_of(place, recipe)}
    # What a stage's own directory tells is more than what its recipe does, but for that it failed.
    told |= {stage.path: stage for stage in found if stage.path not in told or told[stage.path].state != "failed"}
    yield from told.values()
    for name, (place, recipe) in recipes.items():
        yield recipe_of(place, recipe, [stage for stage in found if name == "." or stage.path.startswith(f"{name}/")])


def read_stage(place: Place, config: StatusConfig, done: Mapping[str, Any]) -> Stage | None:
    """What a directory says of itself; None where it is no stage. `done` is what a recipe says of it."""
    if manifest := place.read(MANIFEST_NAME):
        return Stage(
            path=place.name,
            kind=manifest.get("kind", "?"),
            run=manifest.get("fingerprint", "")[:MAX_RUN_ID],
            state="done",
            share=1.0,
            seconds_left=None,
            note=summary_of(manifest.get("measurements", {})) or took_of(done),
            changed=place.changed(MANIFEST_NAME),
        )
    if note := place.read(NOTE):
        when = datetime.fromisoformat(note["time"])
        age = (datetime.now(UTC) - when).total_seconds()
        state = "done" if note["finished"] else "stopped" if age > config.silent_s else "running"
        left = note["seconds_left"]
        return Stage(
            path=place.name,
            kind=note["job"] if note["stage"] == note["job"] else f"{note['job']}: {note['stage']}",
            run=note["run"],
            state=state,
            share=1.0 if state == "done" else note["progress"],
            seconds_left=max(0.0, left - age) if state == "running" and left is not None else None,
            note=", ".join(filter(None, [f"{note['done']:,}/{note['total']:,} {note['unit']}", summary_of(note)])),
            changed=when,
        )
    if CLAIM in place.files:
        mark = (place.store / CLAIM).read().decode()[:MAX_RUN_ID]
        parts = sum(is_part(place.store / name) for name in place.files)
        return Stage(place.name, "?", mark, "begun", None, None, f"{parts:,} parts", place.changed(CLAIM))
    return None


def told_of(place: Place, recipe: Mapping[str, Any]) -> Iterator[Stage]:
    """The stages of a recipe as it tells of them."""
    for name, done in recipe.items():
        state = RECIPE_STATES.get(done["state"], done["state"])
        finished = done.get("finished")
        yield Stage(
            path=name if place.name == "." else f"{place.name}/{name}",
            kind=done.get("job", "?"),
            run="",
            state=state,
            share=1.0 if state == "done" else None,
            seconds_left=None,
            note=took_of(done),
            changed=datetime.fromisoformat(finished) if finished else place.changed(STATE),
        )


def took_of(done: Mapping[str, Any]) -> str:
    """How long a stage took, where its recipe says so."""
    return f"{format_seconds(done['seconds'])} the last time" if done.get("seconds") else ""


def recipe_of(place: Place, recipe: Mapping[str, Any], below: Sequence[Stage]) -> Stage:
    """A recipe by what it says of its stages and by how far these are; the time left is that of the one that runs."""
    running = [stage for stage in below if stage.state == "running"]
    failed = any(done.get("state") == "failed" for done in recipe.values())
    told = [
        f"{name} {done.get('state')}" + (f" in {format_seconds(done['seconds'])}" if done.get("seconds") else "")
        for name, done in recipe.items()
    ]
    return Stage(
        path=place.name,
        kind="recipe",
        run="",
        state="running" if running else "failed" if failed else "idle",
        share=None,
        seconds_left=running[-1].seconds_left if running else None,
        note=", ".join(told),
        changed=max([place.changed(STATE), *(stage.changed for stage in below)]),
    )


def summary_of(measured: Mapping[str, Any]) -> str:
    """The figures that tell most of a stage."""
    forms = {
        "rows": "{:,} rows",
        "texts": "{:,} texts",
        "negatives": "{:,} negatives",
        "recall_at_10": "recall {:.3f}",
        "recall": "recall {:.3f}",
        "loss": "loss {:.4f}",
        "validation": "validation {:.4f}",
        "tokens_per_second": "{:,.0f} tokens/s",
        "padding_waste": "{:.0%} padding",
        "cache_hits": "{:.0%} found in caches",
    }
    told = []
    for name, form in forms.items():
        value = measured.get(name)
        value = value[-1] if isinstance(value, list) and value else value  # a trained model keeps its whole history
        if isinstance(value, int | float):
            told.append(form.format(value))
    return ", ".join(told)


def table_of(found: list[Stage]) -> Table:
    """One line a stage."""
    table = Table("run", "kind", "id", "state", "done", "left", "", "changed")
    for stage in found:
        table.add_row(
            stage.path,
            stage.kind,
            stage.run,
            stage.state,
            "" if stage.share is None else f"{stage.share:.0%}",
            "" if stage.seconds_left is None else format_seconds(stage.seconds_left),
            stage.note,
            stage.changed.astimezone().strftime("%m-%d %H:%M:%S"),
        )
    return table


def main(config: StatusConfig) -> list[Stage]:
    """Print the table."""
    found = stages(config)
    Console(width=160).print(table_of(found))
    return found


if __name__ == "__main__":
    run_job(StatusConfig, main, first="directory")
