"""The jobs that the fault suite disturbs: how each is run, how far it is, and what of its result is lost.

To add one, add an entry to JOBS and the files that it needs to `files` in conftest.py.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import load_file

from embedlib.schemas import vectors_of


class Work(NamedTuple):
    """A job, as the suite knows it."""

    values: Callable[[dict[str, str], Path], dict[str, Any]]
    """Its configuration, of the files and the output directory."""
    progress: Callable[[Path], int]
    """Pieces done, counted on disk."""
    latest: int
    """The last piece after which a fault leaves enough work for whoever recovers."""
    losses: Callable[[Path, Path], int]
    """Pieces of the undisturbed result that the disturbed one lacks, has twice, or has otherwise."""


# A worker that a dying GCS lost is given up long before a run is.
PATIENT = {"max_failures": -1, "stuck_after_s": 90}


def embed_values(files: dict[str, str], output: Path) -> dict[str, Any]:
    """10,240 texts in 80 parts."""
    values = {"input": files["corpus"], "output": str(output), "model": files["model"], "backend": "torch-float32"}
    return values | {"rows_per_part": 128, "num_actors": 3}


def corpus_values(files: dict[str, str], output: Path) -> dict[str, Any]:
    """11,264 rows, of which each eleventh is a copy, in 12 parts, compared in 12 partitions, written as 15 shards."""
    sizes = {"rows_per_part": 1000, "rows_per_partition": 1000, "rows_per_shard": 700}
    values = {"output": str(output), "sources": [{"name": "rows", "path": files["copies"], "lang": "en"}]}
    return values | sizes | {"num_workers": 2}


def mine_values(files: dict[str, str], output: Path) -> dict[str, Any]:
    """2,000 queries in 80 blocks, two shards."""
    return {
        "pairs": files["pairs"],
        "corpus": files["corpus"],
        "output": str(output),
        "model": files["model"],
        "backend": "torch-float32",
        "rule": {"max_negatives": 4},
        "search": {"shards": 2, "index": "exact"},
        "queries_per_block": 25,
    }


def train_values(files: dict[str, str], output: Path) -> dict[str, Any]:
    """Contrast on translations, with a guide."""
    return {
        "output": str(output),
        "model": files["model"],
        "datasets": [{"path": files["translations"]}],
        "validation_share": 0.2,
        "guide": files["model"],
        "training": {
            "epochs": 120,
            "batch_size": 8,
            "objective": {"anchor": 0.1, "guide": {"margin": -0.1}},
            "optimizer": {"learning_rate": 2e-3},
        },
        "workers": {"validate_every": 50, "checkpoint_every": 20} | PATIENT,
    }


def distil_values(files: dict[str, str], output: Path) -> dict[str, Any]:
    """All stages, from the corpus over 12 parts of vectors and some 180 steps to the report."""
    return {
        "output": str(output),
        "teacher": files["model"],
        "corpus": {"path": files["many_sentences"], "validation_share": 0.1, "held_out_share": 0.2},
        "compression": {
            "layers": {"num_layers": 2, "probe_texts": 32},
            "vocabulary": {"size": int(files["vocabulary"])},
        },
        "distillation": {"epochs": 4, "batch_size": 128, "optimizer": {"learning_rate": 1e-3}},
        "workers": {"validate_every": 50, "checkpoint_every": 20} | PATIENT,
        "plots": False,
    }


def vocabulary_of(encoder: Path) -> int:
    """All pieces that the tiny encoder can keep, and the bytes."""
    pieces = {piece for piece, _ in json.loads((encoder / "tokenizer.json").read_text())["model"]["vocab"]}
    return len(pieces - {"<mask>"}) + 256


def num_parts(output: Path) -> int:
    """Part files that are in place."""
    return len(list(output.glob("part-*.parquet")))


def num_pieces(output: Path) -> int:
    """Files of all passes that are in place."""
    return len(list(output.rglob("part-*")))


def last_step(output: Path) -> int:
    """Steps that the training log tells of, in pieces of ten."""
    logs = list(output.glob("training/*/log/history.jsonl"))
    return sum(len(log.read_text().splitlines()) for log in logs)


def num_parts_and_steps(output: Path) -> int:
    """Parts of the teacher's vectors, then what `last_step` counts."""
    return num_pieces(output / "vectors") + last_step(output)


def parts_table(output: Path) -> pa.Table:
    """All parts as one table."""
    return pa.concat_tables([pq.read_table(path) for path in sorted(output.glob("part-*.parquet"))])


def lost_vectors(undisturbed: Path, disturbed: Path) -> int:
    """Ids that are missing, there twice, or have another vector."""
    expected, found = parts_table(undisturbed), parts_table(disturbed)
    wanted, ids = expected["id"].to_numpy(), found["id"].to_numpy()
    order = np.argsort(ids, kind="stable")
    known, counts = np.unique(ids, return_counts=True)
    missing = len(np.setdiff1d(wanted, known)) + int((counts - 1).sum()) + len(np.setdiff1d(known, wanted))
    if missing:
        return missing
    vectors, others = vectors_of(expected["vector"]), vectors_of(found["vector"])[order]
    return int((vectors[np.argsort(wanted, kind="stable")] != others).any(axis=1).sum())


def lost_shards(undisturbed: Path, disturbed: Path) -> int:
    """Files of the corpus that are missing, too many, or of other bytes."""
    contents: list[dict[str, bytes]] = [
        {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("part-*")}
        for output in (undisturbed, disturbed)
    ]
    expected, found = contents
    return sum(expected.get(name) != found.get(name) for name in expected.keys() | found.keys())


def lost_rows(undisturbed: Path, disturbed: Path) -> int:
    """Queries whose negatives are others."""
    expected, found = parts_table(undisturbed).to_pylist(), parts_table(disturbed).to_pylist()
    by_id = {row["id"]: row for row in found}
    return abs(len(expected) - len(found)) + sum(by_id.get(row["id"]) != row for row in expected)


def samples_of(output: Path) -> dict[int, list[int]]:
    """Samples by step, over all workers."""
    steps: dict[int, list[int]] = {}
    for path in output.glob("training/*/log/samples-*.jsonl"):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            steps.setdefault(record["step"], []).extend(record["ids"])
    return {step: sorted(ids) for step, ids in steps.items()}


def lost_training(product: str) -> Callable[[Path, Path], int]:
    """Steps that saw other samples, and weights that came out otherwise."""

    def losses(undisturbed: Path, disturbed: Path) -> int:
        expected, found = samples_of(undisturbed), samples_of(disturbed)
        lost = sum(expected.get(step) != found.get(step) for step in expected.keys() | found.keys())
        weights, others = (load_file(output / product / "model.safetensors") for output in (undisturbed, disturbed))
        return lost + sum(not np.allclose(weights[name], others[name], atol=1e-4) for name in weights)

    return losses


def lost_distillation(undisturbed: Path, disturbed: Path) -> int:
    """Vectors of the teacher, and then what `lost_training` counts."""
    return lost_vectors(undisturbed / "vectors", disturbed / "vectors") + lost_training("student")(
        undisturbed, disturbed
    )


JOBS: dict[str, Work] = {
    "corpus": Work(corpus_values, num_pieces, 32, lost_shards),
    "embed": Work(embed_values, num_parts, 50, lost_vectors),
    "mine": Work(mine_values, num_parts, 50, lost_rows),
    "train": Work(train_values, last_step, 10, lost_training("model")),
    "distill": Work(distil_values, num_parts_and_steps, 20, lost_distillation),
}
