"""What a model was made of: the models and texts that its manifest names, and theirs in turn, with their licences."""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from embedlib.artifact import MANIFEST_NAME, Manifest, contents_fingerprint, model_fingerprint, read_manifest
from embedlib.errors import ArtifactError

# The front matter of a card, as hubs have it.
CARD_LICENCE = re.compile(r"\A---\n(?:.*\n)*?license:\s*(\S+)\s*\n")


# What parents are called that come from outside of a run.
GIVEN = ("teacher", "model", "guide", "corpus")


class Origin(NamedTuple):
    """Something a model was made of."""

    kind: str
    """What its manifest says it is: teacher, corpus, model, … or a file."""
    name: str
    """What it is called."""
    licence: str | None
    """Its licence; none: nothing tells it."""


def origins(directory: Path, models: Iterable[Path] = ()) -> list[Origin]:
    """What a model was made of, the nearest first, the model itself left out.

    Parents are looked for beside the directory, at the paths that manifests name, and among `models`; one that is
    nowhere is told of by name, without a licence.
    """
    known = {model_fingerprint(model): model for model in models}
    waiting, seen = [directory], {directory.resolve()}
    found: dict[Origin, None] = {}
    while waiting:
        here = waiting.pop(0)
        manifest = read_manifest(here)
        if here != directory:
            found |= dict.fromkeys(told(here, manifest))
        if manifest is None:
            continue
        beside = known | dict(marks_beside(here))
        found |= dict.fromkeys(Origin(name, f"{mark[:12]}…", None) for name, mark in lost(manifest, beside))
        named = [beside[mark] for mark in manifest.parents.values() if mark in beside]
        for path in [*named, *paths_in(manifest.config)]:
            place = path if path.is_dir() else path.parent
            if path.is_file() and not (place / MANIFEST_NAME).is_file():
                found[Origin("file", path.name, None)] = None
            elif place.resolve() not in seen:
                seen.add(place.resolve())
                waiting.append(place)
    return list(found)


def lost(manifest: Manifest, known: Mapping[str, Path]) -> Iterator[tuple[str, str]]:
    """The models and corpora among the parents of an artifact that are not among the known ones."""
    for name, mark in manifest.parents.items():
        # The rest is computed of these, and says nothing more.
        if mark not in known and name.startswith(GIVEN):
            yield name, mark


def marks_beside(directory: Path) -> Iterator[tuple[str, Path]]:
    """The artifacts that lie beside one, by what may be named as a parent: their mark, or that of their weights."""
    for path in directory.parent.glob(f"*/{MANIFEST_NAME}"):
        try:
            manifest = read_manifest(path.parent)
        except ArtifactError:
            continue  # another version's, so no parent of ours
        if manifest:
            yield manifest.fingerprint, path.parent
            yield contents_fingerprint(manifest.contents), path.parent


def paths_in(config: Any) -> Iterator[Path]:
    """Files and directories that values of a configuration name."""
    if isinstance(config, dict):
        config = list(config.values())
    if isinstance(config, list):
        for value in config:
            yield from paths_in(value)
    elif isinstance(config, str) and "/" in config and "://" not in config and Path(config).exists():
        yield Path(config)


def told(directory: Path, manifest: Manifest | None) -> Iterator[Origin]:
    """What a directory says of the licences of what it holds; nothing of what was only computed from its parents."""
    if manifest is None:
        yield Origin(
            "model" if (directory / "modules.json").is_file() else "files", directory.name, card_licence(directory)
        )
        return
    config, measured = manifest.config, manifest.measurements
    for source in config.get("sources", []):
        yield Origin(manifest.kind, source["name"], source.get("licence"))
    for name, licence in measured.get("licences", {}).items():
        yield Origin(manifest.kind, name, licence)
    if manifest.kind == "teacher":
        yield Origin(
            manifest.kind, config.get("name", directory.name), config.get("licence") or card_licence(directory)
        )


def card_licence(directory: Path) -> str | None:
    """The licence that a model's card names; none where there is no card, or it names none."""
    card = directory / "README.md"
    match = CARD_LICENCE.match(card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else None
    return match[1] if match else None
