"""The run files as they are shipped, each on tiny models and a few sentences: every stage of a card's recipe runs."""

import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sentence_transformers import SentenceTransformer

from jobs.cli import read_run
from jobs.distill import DistillConfig
from jobs.distill import main as distil
from jobs.recipe import RecipeConfig
from jobs.recipe import main as run_recipe
from tests.conftest import corpus_rows
from tests.jobs.test_distill import WORDS, vocabulary_size

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

RUNS = Path(__file__).parents[2] / "jobs" / "runs"
# Two languages that the tiny tokenizer knows stand for those of the run.
CORPUS = {"languages": ["en", "de"], "validation_share": 0.1, "held_out_share": 0.2}
LAYERS = {"num_layers": 2, "probe_texts": 32, "distil_steps": 5}


def changed(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Values with others in their place, however deep."""
    merged = dict(values)
    for key, value in changes.items():
        merged[key] = changed(merged.get(key) or {}, value) if isinstance(value, dict) else value
    return merged


@pytest.mark.parametrize("name", ["me5s.yaml", "bge-m3-8l.yaml", "bistil.yaml"])
def test_a_distillation_of_a_run_file(name: str, tiny_encoder: Path, tiny_xlmr: Path, tmp_path: Path) -> None:
    teacher = tiny_xlmr if name == "bge-m3-8l.yaml" else tiny_encoder  # bge-m3 is an XLM-RoBERTa
    chance = random.Random(0)
    rows = [
        {"text": " ".join(chance.choices(WORDS[lang], k=chance.randint(3, 9))), "lang": lang, "group": group}
        for group in range(500)
        for lang in ("en", "de", "ru")
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "corpus.parquet")
    changes = {
        "output": str(tmp_path / "run"),
        "teacher": str(teacher),
        "corpus": CORPUS | {"path": str(tmp_path / "corpus.parquet")},
        "compression": {"layers": LAYERS, "vocabulary": {"size": vocabulary_size(teacher)}},
        "plots": False,
    }
    distil(DistillConfig.model_validate(changed(read_run(RUNS / name), changes)))
    student = SentenceTransformer(str(tmp_path / "run" / "student"), device="cpu")
    assert student.encode(["the old garden"]).shape == (1, 32)
    assert student.tokenizer.convert_tokens_to_ids("<unk>") not in student.tokenizer("ნაზი 🦊")["input_ids"]


def test_the_recipe_after_bangla_embed(tiny_encoder: Path, tiny_xlmr: Path, tmp_path: Path) -> None:
    texts = {lang: [row["text"] for row in corpus_rows() if row["lang"] == lang] for lang in ("en", "hi", "de")}
    shifted = texts["en"][1:] + texts["en"][:1]
    tables = {
        "pairs": {"en": texts["en"], "xx": texts["hi"], "lang": ["bn"] * 24},
        "questions": {"query": texts["de"], "passage": texts["en"]},
        "triplets": {"query": texts["hi"], "positive": texts["en"], "negatives": [[text] for text in shifted]},
    }
    paths = {"model": str(tiny_encoder), "teacher": str(tiny_xlmr)}
    for name, columns in tables.items():
        paths[name] = str(tmp_path / f"{name}.parquet")
        pq.write_table(pa.table(columns), paths[name])
    values = changed(read_run(RUNS / "bangla_e5.yaml"), {"output": str(tmp_path / "run"), "paths": paths})
    for stage in values["stages"].values():
        if stage["job"] == "train":
            stage["values"]["training"]["objective"]["dimensions"] = [16, 8]
    done = run_recipe(RecipeConfig.model_validate(values))
    assert {name: stage.state for name, stage in done.items()} == dict.fromkeys(values["stages"], "made")
    merged = SentenceTransformer(str(tmp_path / "run" / "merged" / "model"), device="cpu")
    assert merged.encode(["the old garden"]).shape == (1, 32)
