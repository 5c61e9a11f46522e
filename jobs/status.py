"""What runs have made, are making or have left unfinished: `python jobs/status.py [--directory artifacts]`.

It reads what lies on disk alone: manifests, the notes that running jobs leave, and recipe.json. So it needs no cluster
and tells of dead ones, too.
"""

from jobs.cli import run_job  # isort: skip (takes jobs/ off sys.path before any library is imported)

import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field
from rich.console import Console
from rich.table import Table

from embedlib.artifact import MANIFEST_NAME
from embedlib.config import Config
from embedlib.errors import DataError
from jobs.metrics import MAX_RUN_ID, NOTE
from jobs.parts import CLAIM
from jobs.runtime import artifacts_directory, format_seconds

STATE = "recipe.json"
RECIPE_STATES = {"made": "done", "was there": "done", "running": "begun"}
# Below these lie parts and checkpoints, many files and no stages.
SKIPPED = {"ray", "log", "converted", "quarantine", "judged"}


class StatusConfig(Config):
    """Which runs."""

    directory: Path = Field(default_factory=artifacts_directory)
    """Directory of runs; none: $EMBEDLIB_ARTIFACTS, else ./artifacts."""
    silent_s: float = Field(default=120.0, gt=0)
    """A run that has left no word for so long is taken to have stopped."""


class Stage(NamedTuple):
    """A directory that a job made or makes."""

    path: str
    """Relative to the directory of runs."""
    kind: str
    run: str
    """Beginning of the fingerprint of what is made."""
    state: str
    """done, running, stopped, or begun: by a job that has told nothing yet; of a recipe's stage also waits, failed and
    left out."""
    share: float | None
    seconds_left: float | None
    note: str
    changed: datetime


def stages(config: StatusConfig) -> list[Stage]:
    """All that lies below the directory, in the order in which it was touched last; DataError where there is none."""
    if not config.directory.is_dir():
        raise DataError(f"directory: {config.directory} is no directory")
    found: dict[str, Stage] = {}
    for path in directories(config.directory):
        found |= {stage.path: stage for stage in recipe_stages(path, config)}
        # What a stage's own directory tells is more than what its recipe does, but for that it failed.
        if (stage := read_stage(path, config)) and not (stage.path in found and found[stage.path].state == "failed"):
            found[stage.path] = stage
    return sorted(found.values(), key=lambda stage: stage.changed)


def directories(root: Path) -> Iterator[Path]:
    """Every directory that may be a stage."""
    for path, names, _ in os.walk(root):
        names[:] = sorted(name for name in names if not name.startswith(".") and name not in SKIPPED)
        yield Path(path)


def read_stage(path: Path, config: StatusConfig) -> Stage | None:
    """What a directory says of itself; None where it is no stage."""
    name = str(path.relative_to(config.directory))
    note = read_json(path / NOTE)
    if manifest := read_json(path / MANIFEST_NAME):
        measured = manifest.get("measurements", {})
        summary = summary_of(measured) or note_of(path)
        mark = manifest.get("fingerprint", "")[:MAX_RUN_ID]
        return Stage(name, manifest.get("kind", "?"), mark, "done", 1.0, None, summary, changed(path / MANIFEST_NAME))
    if note:
        age = (datetime.now(UTC) - datetime.fromisoformat(note["time"])).total_seconds()
        share = note["done"] / max(note["total"], 1)
        state = "done" if share >= 1 else "stopped" if age > config.silent_s else "running"
        left = note["seconds_left"]
        summary = f"{note['done']:,}/{note['total']:,} {note['unit']}" + summary_of(note, ", ")
        return Stage(
            path=name,
            kind=note["job"],
            run=note["run"],
            state=state,
            share=share,
            seconds_left=max(0.0, left - age) if state == "running" and left is not None else None,
            note=summary,
            changed=datetime.fromisoformat(note["time"]),
        )
    if (path / CLAIM).exists():
        mark = (path / CLAIM).read_text()[:MAX_RUN_ID]
        parts = len(list(path.glob("part-*.parquet")))
        return Stage(name, "?", mark, "begun", None, None, f"{parts:,} parts", changed(path / CLAIM))
    return None


def recipe_stages(path: Path, config: StatusConfig) -> Iterator[Stage]:
    """The stages of a recipe, where a directory holds one."""
    for name, told in (read_json(path / STATE) or {}).items():
        state = RECIPE_STATES.get(told["state"], told["state"])
        place = path / name
        yield Stage(
            path=str(place.relative_to(config.directory)),
            kind=told.get("job", "?"),
            run="",
            state=state,
            share=1.0 if state == "done" else None,
            seconds_left=None,
            note=note_of(place),
            changed=datetime.fromisoformat(told["finished"]) if told.get("finished") else changed(path / STATE),
        )


def summary_of(measured: dict[str, Any], before: str = "") -> str:
    """The figures that tell most of a stage."""
    names = {
        "rows": "{:,} rows",
        "texts": "{:,} texts",
        "negatives": "{:,} negatives",
        "recall_at_10": "recall {:.3f}",
        "loss": "loss {:.4f}",
        "tokens_per_second": "{:,.0f} tokens/s",
    }
    told = []
    for name, form in names.items():
        value = measured.get(name)
        value = value[-1] if isinstance(value, list) and value else value  # a trained model keeps its whole history
        if isinstance(value, int | float):
            told.append(form.format(value))
    return before + ", ".join(told) if told else ""


def note_of(path: Path) -> str:
    """How long a stage of a recipe took, where recipe.json says so."""
    done = read_json(path.parent / STATE) or {}
    seconds = done.get(path.name, {}).get("seconds")
    return f"{format_seconds(seconds)} the last time" if seconds else ""


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON file's mapping; None where there is none, or somebody else's."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def changed(path: Path) -> datetime:
    """When a file was last written."""
    return datetime.fromtimestamp(path.stat().st_mtime, UTC)


def table_of(found: list[Stage]) -> Table:
    """One line a stage."""
    table = Table("run", "kind", "id", "state", "done", "left", "", "changed")
    for stage in found:
        table.add_row(
            stage.path,
            stage.kind,
            stage.run,
            stage.state,
            "?" if stage.share is None else f"{stage.share:.0%}",
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
    run_job(StatusConfig, main)
