"""A model's README out of what its manifest and its evaluation say, in the form that hubs show."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from embedlib.artifact import EVALUATION_NAME, Manifest, read_manifest
from embedlib.errors import ConfigError
from embedlib.evaluation.evaluation_report import Evaluation, cell_text
from embedlib.evaluation.report import ABSENT, render_page
from embedlib.lineage import origins
from embedlib.model_directory import read_prompts, trained_dimensions

CARD_NAME = "README.md"
# By what a card that may be written anew is told from one that someone else wrote.
WRITTEN_HERE = "<!-- Written by embedlib. -->"


def write_model_card(
    directory: Path, evaluation: Evaluation, name: str, models: Iterable[Path] = (), repository: str | None = None
) -> None:
    """README.md and, for the endpoint, evaluation.json beside the weights; neither is part of the fingerprint.

    `models` are directories among which the model's teacher may be; `repository` is where the hub will have the model.
    ConfigError where there is a card that others wrote.
    """
    require_own_card(directory)
    manifest = read_manifest(directory)
    card = render_page(
        "model_card.md.jinja",
        {},
        name=name,
        address=repository or str(directory),
        written_here=WRITTEN_HERE,
        evaluation=evaluation,
        card=evaluation.scorecard,
        cell=cell_text,
        absent=ABSENT,
        prompts=read_prompts(directory),
        dimensions=trained_dimensions(directory),
        recipe=recipe_of(manifest),
        licence=licence_of(manifest),
        origins=origins(directory, models),
    )
    (directory / CARD_NAME).write_text(card, encoding="utf-8")
    (directory / EVALUATION_NAME).write_text(json.dumps({"retention": evaluation.retention.get(name, {})}) + "\n")


def require_own_card(directory: Path) -> None:
    """ConfigError where a model has a card that others wrote, which a card of ours would take the place of."""
    card = directory / CARD_NAME
    if card.is_file() and WRITTEN_HERE not in card.read_text(encoding="utf-8", errors="replace"):
        raise ConfigError(f"card: {card} is not of embedlib's making and would be lost; move it away first")


def recipe_of(manifest: Manifest | None) -> str:
    """What made the model, as its manifest tells it; nothing where there is none."""
    if manifest is None:
        return ""
    told: dict[str, Any] = {"kind": manifest.kind, "fingerprint": manifest.fingerprint, "parents": manifest.parents}
    return json.dumps(told | {"config": manifest.config}, indent=2, ensure_ascii=False)


def licence_of(manifest: Manifest | None) -> str:
    """The licence that the manifest names; `other` where it names none, for the user to fill in."""
    return str(manifest.config.get("licence", "other")) if manifest else "other"


def push_model(directory: Path, repository: str) -> None:
    """Upload a model directory to the hub; ConfigError says what the hub said."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    try:
        HfApi().create_repo(repository, exist_ok=True)
        HfApi().upload_folder(repo_id=repository, folder_path=directory, commit_message="embedlib")
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError, ValueError) as error:
        raise ConfigError(f"push: {repository!r}: the hub did not take it ({type(error).__name__}: {error})") from error
