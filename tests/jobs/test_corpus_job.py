"""A corpus built from files of every kind: what comes out, whatever the order of work, and after any interruption."""

import gzip
import hashlib
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

import jobs.corpus as job
from embedlib.artifact import Manifest
from embedlib.errors import ArtifactError, ConfigError, DataError
from embedlib.schemas import CORPUS_SHARD, PAIRS, QUERY_PASSAGE
from jobs.corpus import Build, BuildConfig, Shards, build_corpus, cut_shards
from jobs.metrics import NOTE, RunReport
from jobs.parts import part_name

WORDS = ("river", "stone", "garden", "window", "letter", "market", "silver", "winter", "doctor", "engine", "planet")


def sentence(number: int) -> str:
    """A sentence of its own for every number."""
    chance = random.Random(number)
    return f"The {' '.join(chance.choices(WORDS, k=6))} is number {number}."


def translation(number: int) -> str:
    return f"Der Satz mit den Wörtern {' '.join(random.Random(number).choices(WORDS, k=4))} hat Nummer {number}."


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Files of several kinds, some of them broken, with duplicates and evaluation texts at known places."""
    home = tmp_path / "raw"
    home.mkdir()
    langs = ["en", "en", "en", "de"]
    rows = [(sentence(number), langs[number % 4]) for number in range(400)]
    pq.write_table(
        pa.table({"text": [text for text, _ in rows], "lang": [lang for _, lang in rows]}),
        home / "a.parquet",
        row_group_size=60,
    )
    lines = [json.dumps({"text": sentence(number), "lang": "en"}) for number in range(300, 500)]
    (home / "b.jsonl").write_text("\n".join([*lines, "{broken", '{"text": null}', '{"text": "kurz", "lang": "de"}']))
    with gzip.open(home / "c.txt.gz", "wt") as file:
        file.write("".join(f"{sentence(number)}\n" for number in range(450, 600)))
    (home / "d.parquet").write_bytes(b"no Parquet")
    (home / "e.txt").write_bytes(b"")
    pq.write_table(pa.table({"title": ["x", "y"]}), home / "f.parquet")
    pq.write_table(pa.table({"q": [sentence(5).upper(), "nothing"], "n": [1, 2]}), tmp_path / "evaluation.parquet")
    return home


def config_for(raw: Path, output: Path, **changes: Any) -> BuildConfig:
    values: dict[str, Any] = {
        "output": str(output),
        "sources": [{"name": "all", "path": str(raw)}],
        "evaluation": [str(raw.parent / "evaluation.parquet")],
        "validation_share": 0.1,
        "held_out_share": 0.1,
        "rows_per_part": 100,
        "rows_per_partition": 150,
        "rows_per_shard": 64,
        "identify": "never",
    }
    return BuildConfig.model_validate(values | changes)


Runner = Callable[[Build, str, Callable[[Build, int], int], Sequence[int], int], None]


def in_this_process(seed: int, stop_after: int | None = None) -> Runner:
    """`run_numbered` without Ray, in an order of chance, as that of workers is; cut off after some pieces."""
    chance, done = random.Random(seed), [0]

    def run(
        build: Build,
        report: RunReport,
        what: str,
        function: Callable[[Build, int], int],
        missing: Sequence[int],
        total: int,
    ) -> None:
        for number in chance.sample(list(missing), len(missing)):
            if done[0] == stop_after:
                raise KeyboardInterrupt
            done[0] += 1
            function(build, number)

    return run


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def use(seed: int = 0, stop_after: int | None = None) -> None:
        monkeypatch.setattr(job, "run_numbered", in_this_process(seed, stop_after))

    use()
    return use


def content(output: Path) -> dict[str, str]:
    """Hashes of all files but the manifest, whose configuration names its own place, and the run's note."""
    return {
        str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(output.rglob("*"))
        if path.is_file() and path.name not in ("manifest.json", ".fingerprint", NOTE)
    }


def rows_of(output: Path, split: str = "*") -> list[dict[str, Any]]:
    return [
        row
        for path in sorted(output.glob(f"{split}/part-*.parquet"))
        if path.parent.name != "quarantine"
        for row in pq.read_table(path).to_pylist()
    ]


def require_all(manifest: Manifest) -> None:
    measured = manifest.measurements
    lost = sum(measured["reasons"].values()) + sum(measured["quarantined"].values())
    assert measured["rows"] + measured["added"] == measured["kept"] + lost


def test_every_row_is_kept_once_or_told(raw: Path, tmp_path: Path, without_ray: Callable[..., None]) -> None:
    output = tmp_path / "corpus"
    manifest = build_corpus(config_for(raw, output))
    measured = manifest.measurements
    assert measured["rows"] == 400 + 203 + 150 + 1 + 0 + 2
    # 300–399 are in a and b, 450–499 in b and c; 5 is in the evaluation data.
    assert measured["reasons"] == {"duplicate": 150, "in evaluation data": 1, "too short": 1}
    assert measured["quarantined"] == {
        "no column 'text'": 2,
        "not a readable Parquet file": 1,
        "not JSON": 1,
        "null": 1,
    }
    require_all(manifest)
    texts = [row["text"] for row in rows_of(output)]
    assert sorted(texts) == sorted(sentence(number) for number in range(600) if number != 5)
    for split in job.SPLITS:
        rows = rows_of(output, split)
        assert [row["id"] for row in rows] == list(range(measured["splits"][split]))
        sizes = [pq.read_metadata(path).num_rows for path in sorted((output / split).iterdir())]
        assert set(sizes[:-1]) <= {64}
    shard = pq.read_schema(output / "train" / part_name(0))
    assert shard.remove_metadata().equals(CORPUS_SHARD)
    assert not (output / "work").exists()
    quarantined = pa.concat_tables(
        [pq.read_table(path) for path in sorted((output / "quarantine").iterdir())]
    ).to_pylist()
    assert {(Path(row["source"]).name, row["row"], row["reason"]) for row in quarantined} == {
        ("b.jsonl", 200, "not JSON"),
        ("b.jsonl", 201, "null"),
        ("d.parquet", 0, "not a readable Parquet file"),
        ("f.parquet", 0, "no column 'text'"),
        ("f.parquet", 1, "no column 'text'"),
    }
    page = (output / "report.html").read_text()
    assert "599 rows in 3 languages" in page
    assert "kurz" in page
    for path, hashed in manifest.contents.items():
        assert hashlib.sha256((output / path).read_bytes()).hexdigest() == hashed
    assert build_corpus(config_for(raw, output)) == manifest


@pytest.mark.parametrize("seed", range(6))
def test_no_interruption_and_no_order_of_work_shows(
    raw: Path, tmp_path: Path, without_ray: Callable[..., None], seed: int
) -> None:
    changes: dict[str, Any] = {"near_duplicates": 0.9} if seed % 2 else {"balance": {"cap": 200}}
    build_corpus(config_for(raw, tmp_path / "whole", **changes))
    chance = random.Random(seed)
    config = config_for(raw, tmp_path / "again", **changes)
    for _ in range(3):
        without_ray(chance.random(), chance.randint(0, 14))
        try:
            build_corpus(config)
        except KeyboardInterrupt:
            assert not (tmp_path / "again" / "manifest.json").exists()
    without_ray(chance.random())
    build_corpus(config)
    assert content(tmp_path / "again") == content(tmp_path / "whole")


def test_a_seed_shuffles_in_another_way(raw: Path, tmp_path: Path, without_ray: Callable[..., None]) -> None:
    for seed in (0, 1):
        build_corpus(config_for(raw, tmp_path / f"{seed}", seed=seed))
    one, two = ([row["text"] for row in rows_of(tmp_path / f"{seed}")] for seed in (0, 1))
    assert one != two
    assert sorted(one) == sorted(two)


def test_translations_never_part(tmp_path: Path, without_ray: Callable[..., None]) -> None:
    numbers = list(range(300))
    # Every tenth German text translates two English ones.
    rows = {
        "en": [sentence(number) for number in numbers],
        "de": [translation(number - number % 10 if number % 10 == 1 else number) for number in numbers],
    }
    pq.write_table(pa.table(rows), tmp_path / "pairs.parquet")
    source = {
        "name": "p",
        "path": str(tmp_path / "pairs.parquet"),
        "text": "en",
        "lang": "en",
        "right": "de",
        "right_lang": "de",
    }
    manifest = build_corpus(config_for(tmp_path, tmp_path / "corpus", sources=[source], evaluation=[]))
    require_all(manifest)
    split_of = {row["text"]: split for split in job.SPLITS for row in rows_of(tmp_path / "corpus", split)}
    group_of = {row["text"]: row["group"] for row in rows_of(tmp_path / "corpus")}
    torn = 0
    for english, german in zip(rows["en"], rows["de"], strict=True):
        assert english in split_of
        if german in split_of:
            assert split_of[english] == split_of[german]
        else:
            torn += 1
    assert group_of[rows["en"][5]] == group_of[rows["de"][5]]
    assert 0 < torn == 2 * manifest.measurements["reasons"]["translations in two splits"]


@pytest.mark.parametrize(("product", "schema"), [("pairs", PAIRS), ("query_passage", QUERY_PASSAGE)])
def test_rows_of_two_texts(tmp_path: Path, without_ray: Callable[..., None], product: str, schema: pa.Schema) -> None:
    (tmp_path / "a.en").write_text("".join(f"{sentence(number % 90)}\n" for number in range(100)))
    (tmp_path / "a.de").write_text("".join(f"{translation(number % 90)}\n" for number in range(100)))
    source = {
        "name": "moses",
        "path": str(tmp_path / "a.en"),
        "format": "moses",
        "translations": str(tmp_path / "a.de"),
        "lang": "en",
        "right_lang": "de",
    }
    config = config_for(tmp_path, tmp_path / "out", sources=[source], evaluation=[], product=product)
    manifest = build_corpus(config)
    assert manifest.measurements["reasons"] == {"duplicate": 10}
    rows = rows_of(tmp_path / "out")
    assert pq.read_schema(tmp_path / "out" / "train" / part_name(0)).remove_metadata().equals(schema)
    sides = ("left", "right") if product == "pairs" else ("query", "passage")
    assert {tuple(row[side] for side in sides) for row in rows} == {
        (sentence(number), translation(number)) for number in range(90)
    }


def test_a_corpus_grows_without_being_shuffled(raw: Path, tmp_path: Path, without_ray: Callable[..., None]) -> None:
    first = build_corpus(config_for(raw, tmp_path / "first", balance={"max_rows": 400}))
    before = content(tmp_path / "first")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "x.txt").write_text("".join(f"{sentence(number)}\n" for number in range(700)))
    config = config_for(tmp_path / "more", tmp_path / "second", extends=str(tmp_path / "first"), evaluation=[])
    second = build_corpus(config)
    assert content(tmp_path / "first") == before
    require_all(second)
    assert second.measurements["reasons"] == {"in an earlier generation": 400}
    texts = [row["text"] for output in ("first", "second") for row in rows_of(tmp_path / output)]
    assert sorted(texts) == sorted(sentence(number) for number in range(700))
    for split in job.SPLITS:
        ids = [row["id"] for output in ("first", "second") for row in rows_of(tmp_path / output, split)]
        assert ids == list(range(len(ids)))
    nothing_new = {"output": str(tmp_path / "third"), "extends": str(tmp_path / "second")}
    with pytest.raises(DataError, match=r"stays: \{'in an earlier generation': 700\}"):
        build_corpus(config.model_copy(update=nothing_new))
    assert first.fingerprint == second.parents["extends"]


@pytest.mark.parametrize("rows_per_partition", [40, 1000])
def test_a_corpus_grows_in_other_partitions(
    raw: Path, tmp_path: Path, without_ray: Callable[..., None], rows_per_partition: int
) -> None:
    """How many rows are compared at a time is for each build to say, or many new rows would not fit in memory."""
    first = build_corpus(config_for(raw, tmp_path / "first"))
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "x.txt").write_text("".join(f"{sentence(number)}\n" for number in range(900)))
    changes: dict[str, Any] = {"extends": str(tmp_path / "first"), "rows_per_partition": rows_per_partition}
    second = build_corpus(config_for(tmp_path / "more", tmp_path / "second", evaluation=[], **changes))
    assert second.measurements["partitions"] != first.measurements["partitions"]
    texts = [row["text"] for output in ("first", "second") for row in rows_of(tmp_path / output)]
    assert sorted(texts) == sorted(sentence(number) for number in range(900))
    assert second.measurements["reasons"] == {"in an earlier generation": first.measurements["kept"]}


def test_a_renamed_file_is_another_input(tmp_path: Path, without_ray: Callable[..., None]) -> None:
    """Its name says what format it has, and may say its language."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("".join(f"{sentence(number)}\n" for number in range(40)))
    build_corpus(config_for(tmp_path / "in", tmp_path / "out", evaluation=[]))
    (tmp_path / "in" / "a.txt").rename(tmp_path / "in" / "a.jsonl")
    with pytest.raises(ArtifactError, match="out"):
        build_corpus(config_for(tmp_path / "in", tmp_path / "out", evaluation=[]))


def test_sentences_and_not_documents_fill_partitions(tmp_path: Path, without_ray: Callable[..., None]) -> None:
    documents = [" ".join(sentence(number * 20 + place) for place in range(20)) for number in range(50)]
    (tmp_path / "a.txt").write_text("\n".join(documents))
    source = {"name": "a", "path": str(tmp_path / "a.txt"), "lang": "en"}
    manifest = build_corpus(
        config_for(tmp_path, tmp_path / "out", sources=[source], evaluation=[], split_sentences=True)
    )
    assert manifest.measurements["added"] == 950
    assert manifest.measurements["partitions"] == 7


def test_translations_of_an_earlier_text_stay_on_its_side(tmp_path: Path, without_ray: Callable[..., None]) -> None:
    def built(name: str, pairs: list[tuple[str, str]], **changes: Any) -> Manifest:
        lines = [json.dumps({"text": left, "right": right, "right_lang": "de"}) + "\n" for left, right in pairs]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
        source = {"name": "a", "path": str(tmp_path / f"{name}.jsonl"), "lang": "en", "right": "right"}
        values: dict[str, Any] = {"sources": [source], "evaluation": [], "rows_per_partition": 50}
        values |= {"validation_share": 0.3, "held_out_share": 0.3}
        return build_corpus(config_for(tmp_path, tmp_path / name, **values, **changes))

    numbers = range(100)
    built("first", [(sentence(number), f"Mitte {translation(number)}") for number in numbers])
    second = built(
        "second",
        [(f"Mitte {translation(number)}", translation(number)) for number in numbers],
        extends=str(tmp_path / "first"),
    )
    require_all(second)
    splits = {row["text"]: split for split in job.SPLITS for row in rows_of(tmp_path / "first", split)}
    came = {row["text"]: split for split in job.SPLITS for row in rows_of(tmp_path / "second", split)}
    assert 10 < len(came) < 90
    assert all(splits[f"Mitte {text}"] == split for text, split in came.items())
    assert second.measurements["reasons"] == {
        "in an earlier generation": 100,
        "translations in two splits": 100 - len(came),
    }


def test_languages_are_balanced_exactly(raw: Path, tmp_path: Path, without_ray: Callable[..., None]) -> None:
    balance = {"max_rows": 150, "temperature": 0.0}
    manifest = build_corpus(config_for(raw, tmp_path / "out", balance=balance))
    require_all(manifest)
    rows = {lang: some["rows"] for lang, some in manifest.measurements["languages"].items()}
    assert rows == {"de": 50, "en": 50, "und": 50}
    assert manifest.measurements["kept"] == 150


def test_near_duplicates_leave_one_of_each(tmp_path: Path, without_ray: Callable[..., None]) -> None:
    texts = [sentence(number) for number in range(100)] + [sentence(number)[:-1] + "!" for number in range(50)]
    (tmp_path / "a.txt").write_text("\n".join(texts))
    source = {"name": "a", "path": str(tmp_path / "a.txt"), "lang": "en"}
    manifest = build_corpus(
        config_for(tmp_path, tmp_path / "out", sources=[source], evaluation=[], near_duplicates=0.95)
    )
    require_all(manifest)
    kept = {row["text"][:-1] for row in rows_of(tmp_path / "out")}
    assert manifest.measurements["reasons"] == {"near-duplicate": 50}
    assert len(kept) == manifest.measurements["kept"]


def test_translations_of_one_text_are_no_near_duplicates(tmp_path: Path, without_ray: Callable[..., None]) -> None:
    pairs = [{"text": sentence(1), "right": sentence(number), "right_lang": "de"} for number in (20, 33, 47)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    source = {"name": "a", "path": str(tmp_path / "a.jsonl"), "lang": "en", "right": "right"}
    values = {"sources": [source], "evaluation": [], "near_duplicates": 0.95, "product": "pairs", "identify": "never"}
    manifest = build_corpus(config_for(tmp_path, tmp_path / "out", **values))
    assert manifest.measurements["kept"] == 3


def test_evaluation_texts_may_lie_in_lists(tmp_path: Path, without_ray: Callable[..., None]) -> None:
    (tmp_path / "a.txt").write_text("\n".join(sentence(number) for number in range(30)))
    table = pa.table({"query": [sentence(1)], "positive": [[sentence(2), sentence(3)]]})
    pq.write_table(table.set_column(0, "query", table["query"].dictionary_encode()), tmp_path / "e.parquet")
    source = {"name": "a", "path": str(tmp_path / "a.txt"), "lang": "en"}
    manifest = build_corpus(
        config_for(tmp_path, tmp_path / "out", sources=[source], evaluation=[str(tmp_path / "e.parquet")])
    )
    assert manifest.measurements["reasons"] == {"in evaluation data": 3}


def test_a_damaged_row_group_is_told_and_the_others_are_read(tmp_path: Path, without_ray: Callable[..., None]) -> None:
    path = tmp_path / "a.parquet"
    texts = [sentence(number) for number in range(200)]
    pq.write_table(pa.table({"text": texts}), path, row_group_size=100, compression="zstd", use_dictionary=False)
    column = pq.read_metadata(path).row_group(1).column(0)
    damaged = bytearray(path.read_bytes())
    middle = column.data_page_offset + column.total_compressed_size // 2
    damaged[middle : middle + 50] = bytes(50)
    path.write_bytes(damaged)
    source = {"name": "a", "path": str(path), "lang": "en"}
    manifest = build_corpus(config_for(tmp_path, tmp_path / "out", sources=[source], evaluation=[]))
    require_all(manifest)
    assert manifest.measurements["quarantined"] == {"damaged row group": 100}
    assert {row["text"] for row in rows_of(tmp_path / "out")} == set(texts[:100])


def test_tokens_are_counted(raw: Path, tmp_path: Path, tiny_encoder: Path, without_ray: Callable[..., None]) -> None:
    manifest = build_corpus(config_for(raw, tmp_path / "out", tokenizer=str(tiny_encoder)))
    rows = rows_of(tmp_path / "out")
    assert min(row["num_tokens"] for row in rows) > 0
    languages = manifest.measurements["languages"]
    assert sum(some["tokens"] for some in languages.values()) == sum(row["num_tokens"] for row in rows)


def test_what_cannot_be_is_refused(raw: Path, tmp_path: Path, without_ray: Callable[..., None]) -> None:
    output = tmp_path / "out"
    build_corpus(config_for(raw, output))
    with pytest.raises(ArtifactError, match=r"holds corpus \w{12}, but this run makes \w{12}"):
        build_corpus(config_for(raw, output, seed=5))
    with pytest.raises(ConfigError, match="key: 'loose'; expected 'exact', as in extends"):
        build_corpus(config_for(raw, tmp_path / "b", extends=str(output), key="loose"))
    with pytest.raises(ArtifactError, match=r"no manifest\.json; expected a corpus"):
        build_corpus(config_for(raw, tmp_path / "c", extends=str(raw)))
    with pytest.raises(ConfigError, match=r"expected tokenizer\.json"):
        build_corpus(config_for(raw, tmp_path / "d", tokenizer="none"))
    with pytest.raises(DataError, match="not a readable Parquet file"):
        build_corpus(config_for(raw, tmp_path / "e", evaluation=[str(raw / "d.parquet")]))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="none of 1 files has a row"):
        build_corpus(config_for(raw, tmp_path / "g", sources=[{"name": "e", "path": str(tmp_path / "empty.jsonl")}]))
    with pytest.raises(DataError, match="stays"):
        build_corpus(config_for(raw, tmp_path / "f", languages=["xx"]))
    with pytest.raises(ValidationError, match="'a' is the name of two"):
        config_for(raw, output, sources=[{"name": "a", "path": "x"}, {"name": "a", "path": "y"}])


def test_shards_are_cut_over_partitions() -> None:
    counts = np.array([[10, 1], [3, 0], [0, 1], [12, 0]])
    assert cut_shards(counts, 8) == [
        Shards(0, 0, 0, 2, 0),
        Shards(0, 3, 2, 4, 3),
        Shards(1, 0, 0, 1, 0),
    ]


@pytest.mark.ray
def test_any_number_of_workers_gives_the_same_bytes(ray_cluster: None, raw: Path, tmp_path: Path) -> None:
    for workers in (1, 2, 4):
        config = config_for(raw, tmp_path / f"{workers}", num_workers=workers, balance={"max_rows": 300})
        require_all(build_corpus(config))
    assert content(tmp_path / "1") == content(tmp_path / "2") == content(tmp_path / "4")
    note = json.loads((tmp_path / "4" / NOTE).read_text())
    assert (note["job"], note["stage"], note["progress"], note["finished"]) == ("corpus", "write", 1, True)
    with pytest.raises(DataError, match="sources: no row of"):
        build_corpus(config_for(raw, tmp_path / "none", languages=["xx"]))
