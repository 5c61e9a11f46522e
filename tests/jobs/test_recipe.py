"""Recipes: references, values checked at the door, and a small one on a real cluster, run twice."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from sentence_transformers import SentenceTransformer

from embedlib.config import Config
from embedlib.errors import ConfigError, DataError
from jobs.recipe import RecipeConfig, main, read_state, require_files, require_finished, resolve, resolved_paths
from tests.conftest import corpus_rows

TRAIN = {"job": "train", "values": {"model": "{base}", "datasets": [{"path": "{pairs}", "lang": "lang"}]}}


def recipe(stages: dict[str, Any], **values: Any) -> RecipeConfig:
    return RecipeConfig.model_validate(
        {"output": "out", "paths": {"base": "b", "pairs": "p.parquet"}, "stages": stages} | values
    )


def test_a_stage_takes_what_an_earlier_one_makes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EMBEDLIB_ARTIFACTS", str(tmp_path))
    merged = {"job": "merge", "values": {"models": ["{base}", "{first}"]}}
    first, second = resolve(recipe({"first": TRAIN, "second": merged}))
    assert first.after == []
    assert second.after == ["first"]
    assert second.config.model_dump()["models"] == ["b", str(tmp_path / "out" / "first" / "model")]
    assert second.config.model_dump()["output"] == tmp_path / "out" / "second"


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (
            {"a": {"job": "merge", "values": {"models": ["{b}", "{base}"]}}},
            r"stages.a.values.models.0: \{b\} is no path",
        ),
        ({"a": {"job": "merge", "values": {"models": ["x"]}}}, "stages.a.values: models"),
        ({"a": {"job": "merge", "values": {"models": ["x", "y"], "wait": 1}}}, "stages.a.values: wait"),
        ({"base": TRAIN}, "the name is taken"),
        ({"a": TRAIN | {"values": TRAIN["values"] | {"output": "elsewhere"}}}, "stages.a.values.output: 'elsewhere'"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_does(stages: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(recipe(stages))


def test_a_name_that_no_value_can_say_is_refused() -> None:
    with pytest.raises(ValidationError, match="my-stage"):
        recipe({"my-stage": TRAIN})


def test_only_stages_that_there_are() -> None:
    with pytest.raises(ConfigError, match="'nought' is no stage"):
        resolve(recipe({"a": TRAIN}, only=["nought"]))


def test_a_path_without_a_file_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"paths.pairs: 'p.parquet' finds no file"):
        main(recipe({"a": TRAIN}, output=tmp_path / "out"))


def test_a_path_may_lie_below_another(tmp_path: Path) -> None:
    (tmp_path / "sets" / "tatoeba" / "test").mkdir(parents=True)
    # Named before what they are made of.
    paths = {"pairs": "{tatoeba}/test", "tatoeba": "{sets}/tatoeba", "sets": str(tmp_path / "sets"), "base": "b"}
    config = recipe({"a": TRAIN}, paths=paths, output=tmp_path / "out")
    assert resolved_paths(config) == {
        "pairs": f"{tmp_path}/sets/tatoeba/test",
        "tatoeba": f"{tmp_path}/sets/tatoeba",
        "sets": f"{tmp_path}/sets",
        "base": "b",
    }
    require_files(config, resolve(config))
    config = recipe({"a": TRAIN}, paths=paths | {"pairs": "{tatoeba}/flores"})
    with pytest.raises(ConfigError, match=r"paths.pairs: '.*/sets/tatoeba/flores' finds no file"):
        require_files(config, resolve(config))
    with pytest.raises(ConfigError, match=r"paths.flores: \{set\} is no path"):
        resolve(recipe({"a": TRAIN}, paths=paths | {"flores": "{set}/flores"}))
    with pytest.raises(
        ConfigError, match=r"paths.(sets|tatoeba): \{.* of \{.*; expected no path that is made of itself"
    ):
        resolve(recipe({"a": TRAIN}, paths=paths | {"sets": "{tatoeba}"}))


def test_only_the_paths_of_stages_that_run_are_held_to_account(tmp_path: Path) -> None:
    (tmp_path / "pairs.parquet").touch()
    other = {"job": "train", "values": {"model": "{base}", "datasets": [{"path": "{xquad}"}]}}
    paths = {"base": "b", "pairs": str(tmp_path / "pairs.parquet"), "sets": "./nowhere", "xquad": "{sets}/xquad"}
    stages = {"first": TRAIN, "second": other}

    def required(**values: Any) -> None:
        config = recipe(stages, paths=paths | values.pop("paths", {}), **values)
        require_files(config, resolve(config))

    with pytest.raises(ConfigError, match=r"paths.xquad: './nowhere/xquad' finds no file"):
        required()
    required(only=["first"])
    # Nothing that runs lies below `sets` any more.
    required(paths={"xquad": str(tmp_path)})


def test_paths_are_relative_to_where_the_command_was_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("typed", "copy"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "pairs.parquet").touch()
    (tmp_path / "typed" / "texts-1.txt").touch()
    monkeypatch.chdir(tmp_path / "copy")
    monkeypatch.setenv("EMBEDLIB_CWD", str(tmp_path / "typed"))
    other = {"job": "train", "values": {"model": "{base}", "datasets": [{"path": "{texts}"}]}}
    paths = {"base": "some/model", "pairs": "./pairs.parquet", "texts": "texts-*.txt"}
    config = recipe({"a": TRAIN, "b": other}, paths=paths)
    require_files(config, resolve(config))
    assert resolved_paths(config) == {
        "base": "some/model",
        "pairs": str(tmp_path / "typed" / "pairs.parquet"),
        "texts": str(tmp_path / "typed" / "texts-*.txt"),
    }


def test_only_needs_what_it_takes(tmp_path: Path) -> None:
    stages = {"first": TRAIN, "second": {"job": "merge", "values": {"models": ["{base}", "{first}"]}}}
    config = recipe(stages, only=["second"], output=tmp_path)
    with pytest.raises(ConfigError, match="only: 'second' takes 'first', which is not finished"):
        require_finished(config, resolve(config), read_state(config))
    (tmp_path / "first" / "model").mkdir(parents=True)
    (tmp_path / "first" / "model" / "manifest.json").touch()
    require_finished(config, resolve(config), read_state(config))


def jobs_that(monkeypatch: pytest.MonkeyPatch, job: Callable[[Config], object]) -> None:
    """Every stage does this, without a cluster."""
    monkeypatch.setattr("jobs.recipe.Job.run", property(lambda _: job))
    monkeypatch.setattr("jobs.recipe.connect", lambda: None)
    monkeypatch.setattr("jobs.recipe.require_files", lambda *_: None)


def test_only_needs_what_it_takes_with_the_values_of_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Config] = []

    def make(config: Config) -> None:
        model = config.model_dump()["output"] / "model"
        model.mkdir(parents=True, exist_ok=True)
        (model / "manifest.json").touch()
        ran.append(config)

    def refuse(config: Config) -> None:
        raise DataError("holds another")

    def stages(max_characters: int) -> dict[str, Any]:
        first = {"job": "train", "values": TRAIN["values"] | {"max_characters": max_characters}}
        merges = {
            name: {"job": "merge", "values": {"models": ["{base}", f"{{{takes}}}"]}}
            for takes, name in (("first", "second"), ("second", "third"))
        }
        return {"first": first} | merges

    jobs_that(monkeypatch, make)
    main(recipe(stages(100), output=tmp_path / "old"))
    # Moved, it is the same.
    (tmp_path / "old").rename(tmp_path / "new")
    only = {"output": tmp_path / "new", "only": ["third"]}
    main(recipe(stages(100), **only))
    assert len(ran) == 4
    refused = "only: 'third' takes 'second', which was made with other values"
    other = recipe(stages(200), **only)
    with pytest.raises(ConfigError, match=refused):
        main(other)
    with pytest.raises(ConfigError, match=refused):
        main(recipe(stages(100), **only, paths={"base": "other", "pairs": "p.parquet"}))
    # That its job refuses other values makes nothing of them.
    jobs_that(monkeypatch, refuse)
    with pytest.raises(DataError, match="holds another"):
        main(other.model_copy(update={"only": ["first"]}))
    with pytest.raises(ConfigError, match="only: 'second' takes 'first', which was made with other values"):
        main(other.model_copy(update={"only": ["second"]}))
    # Of an earlier form, or gone: what lies there decides.
    state = tmp_path / "new" / "recipe.json"
    told = json.loads(state.read_text())
    state.write_text(json.dumps({name: {"state": each["state"]} for name, each in told.items()}))
    jobs_that(monkeypatch, make)
    main(other)
    state.unlink()
    main(other)
    assert len(ran) == 6


def test_states_and_times_are_kept_from_run_to_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[dict[str, str]] = []
    broken = True

    def states() -> dict[str, str]:
        return {name: told["state"] for name, told in json.loads((tmp_path / "recipe.json").read_text()).items()}

    def train(config: Config) -> None:
        seen.append(states())
        model = config.model_dump()["output"] / "model"
        if broken and model.parent.name == "second":
            raise DataError("no text")
        if not model.exists():
            model.mkdir(parents=True)
            (model / "manifest.json").touch()

    jobs_that(monkeypatch, train)
    config = recipe({"first": TRAIN, "second": TRAIN, "third": TRAIN}, output=tmp_path)
    with pytest.raises(DataError, match=r"stages\.second: no text"):
        main(config)
    assert seen == [
        {"first": "running", "second": "waits", "third": "waits"},
        {"first": "made", "second": "running", "third": "waits"},
    ]
    assert states() == {"first": "made", "second": "failed", "third": "waits"}
    assert "failed" in capsys.readouterr().out
    first = json.loads((tmp_path / "recipe.json").read_text())["first"]

    broken = False
    assert main(config.model_copy(update={"only": ["second"]}))["first"].state == "left out"
    done = main(config)
    assert {name: each.state for name, each in done.items()} == {
        "first": "was there",
        "second": "was there",
        "third": "made",
    }
    assert (done["first"].seconds, done["first"].finished) == (first["seconds"], first["finished"])


def test_a_stage_that_the_user_stops_is_not_called_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(config: Config) -> None:
        raise KeyboardInterrupt

    jobs_that(monkeypatch, interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(recipe({"first": TRAIN}, output=tmp_path))
    assert json.loads((tmp_path / "recipe.json").read_text())["first"]["state"] == "stopped"


def test_the_state_is_whole_for_who_reads_it_and_may_be_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipe.json").write_text('{"first": {"st')
    readers = []
    jobs_that(monkeypatch, lambda _: readers.append((tmp_path / "recipe.json").open()))
    main(recipe({"first": TRAIN}, output=tmp_path))
    # What a reader had opened is not changed under it.
    with readers[0] as reader:
        assert json.load(reader)["first"]["state"] == "running"
    assert json.loads((tmp_path / "recipe.json").read_text())["first"]["state"] == "made"


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_recipe_runs_and_a_rerun_does_nothing_again(
    tmp_path: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = corpus_rows()
    english, german = ([row["text"] for row in rows if row["lang"] == lang] for lang in ("en", "de"))
    pairs = tmp_path / "pairs.parquet"
    pq.write_table(pa.table({"query": english, "positive": german}), pairs)
    rule = {"max_negatives": 2, "relative_margin": None, "short": "random"}
    training = {"epochs": 2, "batch_size": 8, "optimizer": {"learning_rate": 1e-3}}
    data = {"path": "{mined}", "positive": "positives", "negatives": "negatives"}
    stages: dict[str, Any] = {
        "mined": {"job": "mine", "values": {"model": "{base}", "pairs": "{pairs}", "rule": rule}},
        "trained": {"job": "train", "values": {"model": "{base}", "datasets": [data], "training": training}},
        "merged": {"job": "merge", "values": {"models": ["{base}", "{trained}"]}},
    }
    paths = {"base": str(tiny_encoder), "pairs": str(pairs)}
    config = recipe(stages, paths=paths, output=tmp_path / "recipe")
    assert {name: done.state for name, done in main(config).items()} == dict.fromkeys(stages, "made")
    merged = SentenceTransformer(str(tmp_path / "recipe" / "merged" / "model"), device="cpu")
    assert merged.encode(["the cat"]).shape == (1, 32)
    assert {name: done.state for name, done in main(config).items()} == dict.fromkeys(stages, "was there")
    assert json.loads((tmp_path / "recipe" / "recipe.json").read_text())["merged"]["state"] == "was there"
    assert "trained" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_corpus_without_what_means_the_same(tmp_path: Path, tiny_encoder: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    texts = [row["text"] for row in corpus_rows() if row["lang"] == "en"]
    rows.write_text("".join(json.dumps({"text": text + end}) + "\n" for text in texts for end in ("", ".")))
    shares = {"validation_share": 0.0, "held_out_share": 0.0, "identify": "never"}
    near = {"retrieval": "all", "margin": "absolute", "threshold": 0.6}
    stages: dict[str, Any] = {
        "raw": {"job": "corpus", "values": shares | {"sources": [{"name": "rows", "path": "{rows}", "lang": "en"}]}},
        "vectors": {
            "job": "embed",
            "values": {"input": "{raw}/*.parquet", "model": "{base}", "columns": {"keep": ["text", "lang"]}},
        },
        "twins": {"job": "bitext", "values": near | {"source": "{vectors}"}},
        "built": {"job": "corpus", "values": shares | {"sources": [{"name": "kept", "path": "{twins}/kept.parquet"}]}},
    }
    paths = {"base": str(tiny_encoder), "rows": str(rows)}
    config = recipe(stages, paths=paths, output=tmp_path / "recipe")
    assert {name: done.state for name, done in main(config).items()} == dict.fromkeys(stages, "made")
    twins = json.loads((tmp_path / "recipe" / "twins" / "manifest.json").read_text())["measurements"]
    built = pq.read_table(tmp_path / "recipe" / "built" / "train")
    assert 0 < len(built) == twins["kept"] < twins["rows"]["source"]
    assert set(built["lang"].to_pylist()) == {"en"}
    assert {name: done.state for name, done in main(config).items()} == dict.fromkeys(stages, "was there")
