"""A model or data directory with a manifest.json beside its content: what it is, what made it, what it holds.

A directory is finished when its manifest is there, because the manifest is written last and the directory is renamed
into place. Work therefore resumes by what is finished on disk: the same fingerprint is skipped, another is refused.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from embedlib.config import Config
from embedlib.errors import ArtifactError

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1
# What decides the vectors of a sentence-transformers directory: weights, tokenizer, modules, pooling, prompts, length.
MODEL_SUFFIXES = (".safetensors", ".json", ".txt", ".model")
# What jobs/evaluate.py found of a model, beside its weights, for the endpoint to tell; no vector depends on it.
EVALUATION_NAME = "evaluation.json"
FOREIGN_WEIGHTS = ("pytorch_model.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


class Manifest(Config):
    """What a directory is and what made it."""

    format_version: int = FORMAT_VERSION
    """Version of this manifest's form; unknown ones are refused."""
    kind: str
    """What the directory holds: teacher, corpus, student, vectors, dataset, …"""
    fingerprint: str
    """SHA-256 over everything that decides the content."""
    parents: dict[str, str] = Field(default_factory=dict)
    """Fingerprints of the inputs by name."""
    config: dict[str, Any] = Field(default_factory=dict)
    """The resolved configuration that made it."""
    measurements: dict[str, Any] = Field(default_factory=dict)
    """What was counted or measured while making it."""
    contents: dict[str, str] = Field(default_factory=dict)
    """SHA-256 of every file, by path relative to the directory."""


def fingerprint(**parts: Any) -> str:
    """SHA-256 (hex) over the canonical JSON of the named parts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(directory: Path) -> dict[str, str]:
    """SHA-256 of every file below `directory` but its manifest, by relative path."""
    return {
        str(path.relative_to(directory)): hash_file(path)
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != MANIFEST_NAME
    }


def model_fingerprint(directory: Path) -> str:
    """SHA-256 over the files that decide a sentence-transformers directory's vectors; our manifest is not one."""
    require_model(directory)
    return weights_fingerprint(directory)


def weights_fingerprint(directory: Path) -> str:
    """SHA-256 over weights, tokenizer and configuration of a model directory of any kind."""
    return contents_fingerprint(hash_files(directory))


def contents_fingerprint(hashes: Mapping[str, str]) -> str:
    """The same of files that were hashed before, by path relative to the directory."""
    return fingerprint(files={k: v for k, v in hashes.items() if k.endswith(MODEL_SUFFIXES) and k != EVALUATION_NAME})


def require_model(directory: Path) -> None:
    """Raise ArtifactError unless `directory` is a sentence-transformers directory whose weights are all safetensors."""
    refuse_pickled_weights(directory)
    if not (directory / "modules.json").is_file():
        raise ArtifactError(f"model {directory}: no modules.json; expected a sentence-transformers directory")
    require_safetensors(directory)


def require_safetensors(directory: Path) -> None:
    """Raise ArtifactError where a model directory has no weights that are safetensors."""
    if next(directory.rglob("*.safetensors"), None) is None:
        raise ArtifactError(f"model {directory}: no *.safetensors weights found")


def refuse_pickled_weights(directory: Path) -> None:
    """Raise ArtifactError where a module's folder holds pickled weights and no safetensors."""
    for pattern in FOREIGN_WEIGHTS:
        for path in directory.rglob(pattern):
            if next(path.parent.glob("*.safetensors"), None) is not None:
                continue
            raise ArtifactError(
                f"model {directory}: weights are pickled ({path.name}), which can run code when loaded; "
                "expected *.safetensors. Convert the model with save_pretrained(safe_serialization=True) first."
            )


def read_manifest(directory: Path) -> Manifest | None:
    """The manifest of a finished directory, None where there is none, ArtifactError where it cannot be understood."""
    path = directory / MANIFEST_NAME
    return parse_manifest(path.read_bytes(), str(path)) if path.is_file() else None


def mark_of(directory: Path) -> str:
    """The fingerprint of a finished directory."""
    return manifest_of(directory).fingerprint


def manifest_of(directory: Path) -> Manifest:
    """The manifest of a finished directory; ArtifactError where it is not finished."""
    manifest = read_manifest(directory)
    if manifest is None:
        raise ArtifactError(f"{directory}: not finished; expected a manifest")
    return manifest


def parse_manifest(content: bytes, name: str) -> Manifest:
    """The manifest that a file called `name` holds; ArtifactError where it cannot be understood."""
    try:
        manifest = Manifest.model_validate_json(content)
    except ValidationError as error:
        raise ArtifactError(f"{name}: not a manifest embedlib can read: {error}") from error
    if manifest.format_version != FORMAT_VERSION:
        raise ArtifactError(f"{name}: format_version {manifest.format_version}; this embedlib reads {FORMAT_VERSION}")
    return manifest


def is_finished(directory: Path, expected_fingerprint: str) -> bool:
    """Whether `directory` is a finished artifact of this fingerprint; ArtifactError where another is in the way."""
    manifest = read_manifest(directory)
    if manifest is None:
        if directory.exists() and any(directory.iterdir()):
            raise ArtifactError(
                f"{directory}: not empty and without {MANIFEST_NAME}; move it away or choose another output"
            )
        return False
    if manifest.fingerprint != expected_fingerprint:
        raise ArtifactError(
            f"{directory}: holds {manifest.kind} {manifest.fingerprint[:12]}, but this run makes "
            f"{expected_fingerprint[:12]}; move it away or choose another output"
        )
    return True


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write `manifest` beside the content with the hashes of what the directory holds now."""
    complete = manifest.model_copy(update={"contents": hash_files(directory)})
    temporary = directory / f".{MANIFEST_NAME}"
    temporary.write_text(complete.model_dump_json(indent=2) + "\n")
    temporary.replace(directory / MANIFEST_NAME)


@contextmanager
def whole_directory(directory: Path) -> Iterator[Path]:
    """Yield a scratch directory that becomes `directory` when the block ends well, at once and whole.

    A failure leaves nothing behind, so that a rerun starts clean. Where another process was quicker, its work stays.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = directory.parent / f".{directory.name}.partial-{os.getpid()}"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        yield scratch
        if not directory.exists() or not any(directory.iterdir()):
            scratch.replace(directory)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def new_artifact(directory: Path, kind: str, fingerprint: str, **fields: Any) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield a scratch directory and a dict for measurements; on success they become `directory`, at once and whole."""
    measurements: dict[str, Any] = {}
    try:
        with whole_directory(directory) as scratch:
            yield scratch, measurements
            write_manifest(scratch, Manifest(kind=kind, fingerprint=fingerprint, measurements=measurements, **fields))
    except OSError as error:
        raise ArtifactError(f"{kind} {directory}: could not be written: {error}") from error
    is_finished(directory, fingerprint)  # raises where other work was quicker
