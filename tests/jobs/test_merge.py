"""What can be merged, and what the merged model may say of itself; none of it needs a cluster."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from tokenizers import Tokenizer
from tokenizers.models import BPE

from embedlib.errors import ArtifactError, ConfigError
from embedlib.model_directory import trained_dimensions, write_json, write_trained_dimensions
from embedlib.storage import user_path
from jobs.cli import read_config
from jobs.merge import FOUND, UNIFORM, MergeConfig, merge, warning_of


@pytest.fixture
def others(tiny_encoder: Path, tmp_path: Path) -> list[Path]:
    """Two models that are alike, to be changed."""
    return [shutil.copytree(tiny_encoder, tmp_path / name) for name in ("first", "second")]


def merged(models: list[Path], tmp_path: Path, **values: Any) -> Path:
    given = {"output": str(tmp_path / "merged"), "models": [str(model) for model in models]}
    return merge(MergeConfig.model_validate(given | values))


def test_a_merged_model_may_be_cut_where_all_its_parts_may(others: list[Path], tmp_path: Path) -> None:
    for model, sizes in zip(others, ([16, 8], [16, 4]), strict=True):
        write_trained_dimensions(model, sizes)
    assert trained_dimensions(merged(others, tmp_path)) == [16]


def test_no_sizes_leave_none_noted(tiny_encoder: Path, others: list[Path]) -> None:
    noted = others[0] / "config_sentence_transformers.json"
    before = noted.read_text()
    write_trained_dimensions(others[0], [16])
    write_trained_dimensions(others[0], [])
    assert json.loads(noted.read_text()) == json.loads(before)
    noted.unlink()
    write_trained_dimensions(others[0], [])
    assert not noted.exists()


def changed(path: Path, **values: Any) -> None:
    write_json(path, json.loads(path.read_text()) | values)


def test_models_that_are_not_used_alike_are_refused(others: list[Path], tmp_path: Path) -> None:
    second = others[1]
    changed(second / "tokenizer.json", normalizer={"type": "Lowercase"})
    with pytest.raises(ConfigError, match=r"normalizer of .*second's tokenizer is not that of .*first"):
        merged(others, tmp_path)
    shutil.copy(others[0] / "tokenizer.json", second)
    changed(second / "config_sentence_transformers.json", prompts={"query": "ask: "})
    with pytest.raises(ConfigError, match=r"prompts of .*second: .*ask: "):
        merged(others, tmp_path)
    shutil.copy(others[0] / "config_sentence_transformers.json", second)
    changed(second / "1_Pooling" / "config.json", pooling_mode_mean_tokens=False, pooling_mode_cls_token=True)
    with pytest.raises(ConfigError, match=r"pooling of .*second"):
        merged(others, tmp_path)
    (second / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"second has no tokenizer\.json"):
        merged(others, tmp_path)


def test_whatever_decides_how_texts_are_cut_is_compared(others: list[Path], tmp_path: Path) -> None:
    vocabulary = {piece: number for number, piece in enumerate(["a", "b", "c", "ab", "bc", "abc"])}
    for directory, merges in zip(others, ([("a", "b"), ("ab", "c")], [("b", "c"), ("a", "bc")]), strict=True):
        Tokenizer(BPE(vocabulary, merges)).save(str(directory / "tokenizer.json"))
    with pytest.raises(ConfigError, match=r"models: model\.merges of .*second's tokenizer is not that of .*first"):
        merged(others, tmp_path)
    for values in ({}, {"byte_fallback": True}):
        model = BPE(vocabulary, [("a", "b"), ("ab", "c")], **values)
        Tokenizer(model).save(str(others[len(values)] / "tokenizer.json"))
    with pytest.raises(ConfigError, match=r"models: model\.byte_fallback of .*second's tokenizer"):
        merged(others, tmp_path)


def test_what_an_older_version_left_out_is_no_difference(others: list[Path], tmp_path: Path) -> None:
    path = others[1] / "tokenizer.json"
    whole = json.loads(path.read_text())
    assert whole["model"].pop("byte_fallback") is False
    write_json(path, whole)
    merged(others, tmp_path)


def test_a_base_is_none_of_the_models(others: list[Path], tiny_encoder: Path, tmp_path: Path) -> None:
    merged([*others, tiny_encoder], tmp_path)
    with pytest.raises(ArtifactError, match="but this run makes"):
        merged(others, tmp_path, base=str(tiny_encoder))


PROBE = {"data": [{"path": "pairs.parquet"}]}
SEARCH = {"method": "self_positioning", "base": "base"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weights": [1.0, 1.0]}, r"weights: \[1.0, 1.0\] add up to 2; expected 1 for linear"),
        ({"weights": [1.0, 0.5], "method": "slerp"}, r"weights: \[1.0, 0.5\] add up to 1.5; expected 1 for slerp"),
        (SEARCH | {"weights": [0.5, 0.5], "probe": PROBE}, r"weights: \[0.5, 0.5\]; expected none"),
        ({"probe": PROBE}, rf"probe.data: \['{re.escape(user_path('pairs.parquet'))}'\]; expected none for linear"),
        ({"density": 0.2}, "density: 0.2; expected none for linear"),
        (
            SEARCH | {"probe": {"data": [{"path": "sts.parquet", "label": "score"}]}},
            "probe.data.0.label: 'score'; expected none, InfoNCE has no term that reads it",
        ),
    ],
)
def test_what_a_method_would_ignore_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        MergeConfig.model_validate({"output": "merged", "models": ["a", "b"]} | values)


def test_what_a_method_does_without_is_not_missed_on_the_command_line() -> None:
    arguments = ["--output", "merged", "--models", '["a", "b"]']
    assert read_config(MergeConfig, arguments).density is None
    assert read_config(MergeConfig, [*arguments, "--method", "ties", "--base", "c"]).density is None


@pytest.mark.parametrize(("uniform", "found", "warns"), [(0.5, 0.6, False), (0.5, 0.5, True), (0.51, 0.5, True)])
def test_a_search_that_finds_nothing_better_says_so(uniform: float, found: float, warns: bool) -> None:
    scores = [{"model": UNIFORM, "mean": uniform}, {"model": FOUND, "mean": found}]
    warning = warning_of({"scores": scores})
    assert (warning is not None and f"{uniform:.4f}" in warning) == warns


def test_a_probe_s_objective_needs_what_it_needs(others: list[Path], tmp_path: Path) -> None:
    graded = {"path": "sts.parquet", "objective": {"info_nce": {"weight": 0}, "cosent": {"weight": 1}}}
    probe = {"data": [{"path": "pairs.parquet"}, graded]}
    with pytest.raises(ValueError, match=r"probe.data.1.label: none; probe.data.1.objective has a term that needs it"):
        merged(others, tmp_path, base=str(others[0]), method="self_positioning", probe=probe)


@pytest.mark.parametrize(
    ("objective", "asked"), [({"guide": {}}, "guide"), ({"distil": {"weight": 1.0}, "anchor": 0.1}, "teacher")]
)
def test_a_probe_has_neither_guide_nor_teacher(objective: dict[str, Any], asked: str) -> None:
    data = [{"path": "pairs.parquet"}, {"path": "more.parquet", "objective": objective}]
    values = SEARCH | {"output": "merged", "models": ["a", "b"], "probe": {"data": data}}
    with pytest.raises(
        ValidationError, match=f"probe.data.1.objective: has a term that needs a {asked}; expected none"
    ):
        MergeConfig.model_validate(values)
