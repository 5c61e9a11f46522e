"""What the table of the recipe after bangla-embed-e5-small is made of: its texts, its ablated stages."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import bangla
from jobs.cli import read_run
from jobs.recipe import RecipeConfig, resolve


def test_a_premise_that_entails_one_sentence_and_contradicts_another_is_a_triplet() -> None:
    rows = [
        ("a dog runs", "an animal moves", "entailment"),
        ("a dog runs", "a dog sleeps", "contradiction"),
        ("a dog runs", "a dog is brown", "neutral"),
        ("it rains", "the street is wet", "entailment"),
    ]
    table = pa.table(dict(zip(("sentence1", "sentence2", "gold_label"), zip(*rows, strict=True), strict=True)))
    triplet = {"query": "a dog runs", "positive": "an animal moves", "negatives": ["a dog sleeps"]}
    assert bangla.nli_triplets(table).to_pylist() == [triplet]


def test_each_ablated_stage_differs_from_the_recipe_by_its_ingredient() -> None:
    stages = bangla.with_variants(read_run(bangla.RECIPE))["stages"]
    whole = stages["contrasted"]["values"]
    ablated = {name: stages[name]["values"] for name in ("no_anchor", "no_mined", "no_matryoshka")}
    assert whole["training"]["objective"]["anchor"] > 0 == ablated["no_anchor"]["training"]["objective"]["anchor"]
    assert whole["training"]["objective"]["dimensions"]
    assert ablated["no_matryoshka"]["training"]["objective"]["dimensions"] == []
    assert "negatives" in whole["datasets"][0]
    assert "negatives" not in ablated["no_mined"]["datasets"][0]
    for values in ablated.values():
        assert values["datasets"][1:] == whole["datasets"][1:]
        assert values["training"]["optimizer"] == whole["training"]["optimizer"]


def test_the_variants_are_a_recipe_of_texts_that_are_there(tmp_path: Path) -> None:
    data, root = tmp_path / "data", tmp_path / "sets"
    (root / "kornli_xnli").mkdir(parents=True)
    data.mkdir()
    pairs = [{"en": f"house {number}", "xx": f"বাড়ি {number}", "lang": ("bn", "de")[number % 2]} for number in range(40)]
    asked = [
        {"query": f"what {number}", "passage": f"this {number}", "lang": lang}
        for lang in (*bangla.QUESTIONS, "ko")
        for number in range(20)
    ]
    nli = [
        {"sentence1": f"premise {number}", "sentence2": f"{label} {number}", "gold_label": label}
        for number in range(20)
        for label in ("entailment", "contradiction")
    ]
    pq.write_table(pa.Table.from_pylist(pairs), data / "pairs.parquet")
    pq.write_table(pa.Table.from_pylist(asked), data / "query_passage.parquet")
    pq.write_table(pa.Table.from_pylist(nli), root / "kornli_xnli" / "xnli_ko.parquet")
    paths = bangla.write_texts(data, root, tmp_path, 1.0)
    assert pq.read_metadata(paths["pairs"]).num_rows == 20
    assert set(pq.read_table(paths["questions"])["lang"].to_pylist()) == set(bangla.QUESTIONS)
    recipe = read_run(bangla.RECIPE)
    values = {"output": str(tmp_path / "run"), "paths": recipe["paths"] | paths | {"sets": str(root)}}
    names = [stage.name for stage in resolve(RecipeConfig.model_validate(bangla.with_variants(recipe) | values))]
    assert names == [
        *list(recipe["stages"])[:-1],
        "no_anchor",
        "no_mined",
        "no_matryoshka",
        "merged_ends",
        "merged_equal",
        "merged_base",
    ]
