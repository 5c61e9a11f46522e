"""What a model was made of is found by its manifests: beside it, at paths they name, among models at hand."""

import shutil
import zipfile
from pathlib import Path

import pytest

from embedlib.artifact import Manifest, model_fingerprint, write_manifest
from embedlib.lineage import Origin, origins
from embedlib.wheels import wheel_licence


def artifact(directory: Path, kind: str, **fields: object) -> str:
    directory.mkdir(exist_ok=True)
    manifest = Manifest(kind=kind, fingerprint=f"mark of {directory.name}", **fields)  # type: ignore[arg-type]
    write_manifest(directory, manifest)
    return manifest.fingerprint


def test_parents_are_found_beside_by_path_and_among_models(tmp_path: Path, tiny_encoder: Path) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    run.mkdir()
    teacher = shutil.copytree(tiny_encoder, tmp_path / "teacher")
    (teacher / "README.md").write_text("---\nlanguage:\n- de\nlicense: mit\n---\n# A teacher\n")
    sources = [{"name": "wiki", "licence": "CC-BY-SA-4.0"}, {"name": "chat"}]
    artifact(elsewhere, "corpus", config={"sources": sources})
    demo = artifact(run / "corpus", "corpus", measurements={"licences": {"Django==5.2": "BSD-3-Clause"}})
    (tmp_path / "pairs.parquet").write_bytes(b"")
    initial = artifact(
        run / "student_initial",
        "student_initial",
        parents={"teacher": model_fingerprint(teacher), "corpus": demo},
    )
    config = {"datasets": [{"path": str(elsewhere / "manifest.json")}, {"path": str(tmp_path / "pairs.parquet")}]}
    artifact(run / "student", "student", parents={"student_initial": initial}, config=config)
    assert set(origins(run / "student", [teacher])) == {
        Origin("corpus", "wiki", "CC-BY-SA-4.0"),
        Origin("corpus", "chat", None),
        Origin("corpus", "Django==5.2", "BSD-3-Clause"),
        Origin("model", "teacher", "mit"),
        Origin("file", "pairs.parquet", None),
    }


def test_a_parent_that_is_gone_is_told_without_a_licence(tmp_path: Path) -> None:
    artifact(tmp_path / "student", "student", parents={"teacher": "0123456789abcdef", "dataset": "gone"})
    assert origins(tmp_path / "student") == [Origin("teacher", "0123456789ab…", None)]


@pytest.mark.parametrize(
    ("metadata", "licence"),
    [
        ("License-Expression: MIT\nLicense: other", "MIT"),
        ("License: GPL version 2", "GPL version 2"),
        ("License: Text\n of many lines\nClassifier: License :: OSI Approved :: MIT License", "MIT License"),
        ("Classifier: Topic :: Text Processing", None),
    ],
)
def test_a_wheels_licence_is_what_its_metadata_say_in_a_few_words(
    metadata: str, licence: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "some-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("some-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: some\n{metadata}\n\nText.\n")
    assert wheel_licence(path) == licence
