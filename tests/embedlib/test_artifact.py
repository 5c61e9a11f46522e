import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from embedlib.artifact import (
    MANIFEST_NAME,
    Manifest,
    fingerprint,
    hash_file,
    is_finished,
    model_fingerprint,
    new_artifact,
    read_manifest,
    write_manifest,
)
from embedlib.errors import ArtifactError

FIRST, SECOND = fingerprint(work="first"), fingerprint(work="second")


def make(directory: Path, mark: str = FIRST) -> None:
    with new_artifact(directory, "dataset", mark, parents={"texts": SECOND}) as (scratch, measurements):
        (scratch / "deep").mkdir()
        (scratch / "deep" / "rows.txt").write_text("rows")
        measurements["rows"] = 1


def test_success_is_one_rename_with_a_manifest(tmp_path: Path) -> None:
    make(tmp_path / "below" / "data")
    directory = tmp_path / "below" / "data"
    manifest = read_manifest(directory)
    assert manifest is not None
    assert (manifest.kind, manifest.fingerprint, manifest.parents) == ("dataset", FIRST, {"texts": SECOND})
    assert manifest.measurements == {"rows": 1}
    assert manifest.contents == {"deep/rows.txt": hash_file(directory / "deep" / "rows.txt")}
    assert [path.name for path in directory.parent.iterdir()] == ["data"]


def test_nothing_is_there_before_the_end(tmp_path: Path) -> None:
    with new_artifact(tmp_path / "data", "dataset", FIRST) as (scratch, _):
        (scratch / "rows.txt").write_text("rows")
        assert not (tmp_path / "data").exists()
        assert not is_finished(tmp_path / "data", FIRST)
    assert is_finished(tmp_path / "data", FIRST)


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    def fail() -> None:
        with new_artifact(tmp_path / "data", "dataset", FIRST) as (scratch, _):
            (scratch / "rows.txt").write_text("rows")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert not list(tmp_path.iterdir())
    make(tmp_path / "data")
    assert is_finished(tmp_path / "data", FIRST)


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with (
        pytest.raises(ArtifactError, match=r"dataset .*data: could not be written: .*No space left on device"),
        new_artifact(tmp_path / "data", "dataset", FIRST) as (scratch, _),
    ):
        (scratch / "rows.bin").write_bytes(b"rows")
    monkeypatch.undo()
    assert not list(tmp_path.iterdir())


def test_what_is_in_the_way_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "precious.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"not empty and without manifest\.json"):
        make(tmp_path / "data")
    assert [path.name for path in tmp_path.rglob("*")] == ["data", "precious.txt"]


def test_an_empty_directory_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    make(tmp_path / "data")
    assert is_finished(tmp_path / "data", FIRST)


def test_finished_work_is_skipped_and_other_work_refused_by_both_names(tmp_path: Path) -> None:
    assert not is_finished(tmp_path / "data", FIRST)
    make(tmp_path / "data")
    assert is_finished(tmp_path / "data", FIRST)
    with pytest.raises(ArtifactError) as caught:
        is_finished(tmp_path / "data", SECOND)
    assert FIRST[:12] in str(caught.value)
    assert SECOND[:12] in str(caught.value)


def test_a_foreign_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"not empty and without manifest\.json"):
        is_finished(tmp_path, FIRST)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (json.dumps({"format_version": 99, "kind": "x", "fingerprint": "y"}), "format_version 99; this embedlib reads"),
        (json.dumps({"kind": "x", "fingerprint": "y", "later": 1}), "not a manifest embedlib can read"),
        ("not json", "not a manifest embedlib can read"),
    ],
)
def test_unknown_manifests_are_refused(tmp_path: Path, content: str, reason: str) -> None:
    (tmp_path / MANIFEST_NAME).write_text(content)
    with pytest.raises(ArtifactError, match=reason):
        is_finished(tmp_path, FIRST)


def test_fingerprint_is_of_names_and_values_in_any_order() -> None:
    assert fingerprint(a=1, b=[2]) == fingerprint(b=[2], a=1)
    assert len({fingerprint(a=1), fingerprint(b=1), fingerprint(a=2), fingerprint(a="1")}) == 4


@pytest.fixture
def model(tiny_encoder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_encoder, tmp_path / "model"))


def edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_weights(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    weights["embeddings.LayerNorm.bias"][0] += 1e-3
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


CHANGES = {
    "weights": edit_weights,
    "tokenizer": lambda model: edit_json(model / "tokenizer.json", normalizer=None),
    "prompt": lambda model: edit_json(model / "config_sentence_transformers.json", prompts={"query": "q: "}),
    "pooling": lambda model: edit_json(model / "1_Pooling" / "config.json", pooling_mode_cls_token=True),
    "length": lambda model: edit_json(model / "tokenizer_config.json", model_max_length=32),
}


@pytest.mark.parametrize("part", CHANGES)
def test_whatever_decides_the_vectors_changes_the_fingerprint(model: Path, part: str) -> None:
    before = model_fingerprint(model)
    CHANGES[part](model)
    assert model_fingerprint(model) != before


def test_what_lies_beside_a_model_does_not_change_its_fingerprint(model: Path, tiny_encoder: Path) -> None:
    write_manifest(model, Manifest(kind="student", fingerprint=FIRST))
    (model / "README.md").write_text("about")
    assert model_fingerprint(model) == model_fingerprint(tiny_encoder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt", "model.pkl"])
def test_pickled_weights_are_refused(model: Path, name: str) -> None:
    (model / "model.safetensors").unlink()
    torch.save({}, model / name)
    with pytest.raises(ArtifactError, match=rf"weights are pickled \({name}\).*expected \*\.safetensors"):
        model_fingerprint(model)


def test_a_directory_without_weights_or_modules_is_refused(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"no \*\.safetensors weights found"):
        model_fingerprint(model)
    with pytest.raises(ArtifactError, match=r"no modules\.json"):
        model_fingerprint(tmp_path)


def test_a_pickled_module_beside_safetensors_is_refused(model: Path) -> None:
    (model / "2_Dense").mkdir()
    torch.save({}, model / "2_Dense" / "pytorch_model.bin")
    with pytest.raises(ArtifactError, match="weights are pickled"):
        model_fingerprint(model)
