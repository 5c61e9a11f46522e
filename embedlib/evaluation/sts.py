"""Semantic textual similarity from local Parquet sets: pairs of sentences with a human score, as MTEB ships them."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embedlib.errors import DataError
from embedlib.metrics import Vectors, sts_spearman

COLUMNS = ("sentence1", "sentence2", "score")


class StsSet(NamedTuple):
    """One test set: row i of each field belongs to pair i."""

    name: str
    sentence1: list[str]
    sentence2: list[str]
    score: npt.NDArray[np.float64]
    """Human similarity, usually 0 to 5; only its order counts."""


def load_sts(path: Path) -> list[StsSet]:
    """The sets of a Parquet file, or of a directory: its `test.parquet` if there is one, else every Parquet file.

    A set is named after its file (`STS12`), or its directory where the file is called `test`; a `lang` column splits a
    file into one set a language (`stsb_multilingual/de`). Raises DataError where files, columns or values are missing.
    """
    path = path.resolve()
    if path.is_dir():
        files = [path / "test.parquet"] if (path / "test.parquet").is_file() else sorted(path.glob("*.parquet"))
    else:
        files = [path] if path.is_file() else []
    if not files:
        raise DataError(f"STS {path}: no Parquet file; expected one, or a directory with test.parquet or *.parquet")
    return [sts_set for file in files for sts_set in _read_file(file)]


def score_sts(encode: Callable[[list[str]], Vectors], sets: Iterable[StsSet]) -> dict[str, float]:
    """Spearman correlation x 100 by set name.

    `encode` maps n texts to `(n, embedding_dim)` and applies the model's prompt itself; it is called once, with every
    distinct sentence of all sets.
    """
    sets = list(sets)
    row = {text: 0 for one in sets for texts in (one.sentence1, one.sentence2) for text in texts}
    row |= {text: index for index, text in enumerate(row)}
    vectors = encode(list(row))
    if len(vectors) != len(row):
        raise DataError(f"STS: the encoder gave {len(vectors)} vectors for {len(row)} texts")

    def rows(texts: list[str]) -> Vectors:
        return vectors[[row[text] for text in texts]]

    return {one.name: 100 * sts_spearman(rows(one.sentence1), rows(one.sentence2), one.score) for one in sets}


def _read_file(file: Path) -> list[StsSet]:
    name = file.parent.name if file.stem == "test" else file.stem
    try:
        table = pq.read_table(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"STS {file}: not a readable Parquet file: {error}") from error
    for column in COLUMNS:
        if column not in table.column_names:
            raise DataError(f"STS {file}: no column {column!r}; found {', '.join(table.column_names)}")
        if table[column].null_count:
            raise DataError(f"STS {file}: column {column!r} has {table[column].null_count} empty values; expected none")
    if "lang" not in table.column_names:
        return [_as_set(name, table)]
    languages = sorted(table["lang"].unique().to_pylist())
    return [_as_set(f"{name}/{lang}", table.filter(pc.equal(table["lang"], lang))) for lang in languages]


def _as_set(name: str, table: Any) -> StsSet:
    sentence1, sentence2, score = (table[column] for column in COLUMNS)
    return StsSet(name, sentence1.to_pylist(), sentence2.to_pylist(), np.asarray(score.to_pylist(), np.float64))
