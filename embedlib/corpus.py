"""A user's corpus as CORPUS Parquet files: read in a stream, checked at the door, split without leaks.

Rows that cannot be used go to `quarantine.parquet` with their reason; nothing is dropped in silence. A text's split is
decided by the hash of its group or of itself, so that equal texts, and texts that translate each other, stay together.
"""

import glob
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from random import Random
from typing import Any, NamedTuple
from unicodedata import normalize

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from embedlib.config import Config
from embedlib.errors import DataError
from embedlib.schemas import CORPUS, QUARANTINE, UNKNOWN_LANGUAGE
from embedlib.storage import UserPath

READ_ROWS = 8192
EXCERPT_CHARACTERS = 200
SPLITS = ("train", "validation", "held_out")
LANGUAGE_TAG = re.compile("[A-Za-z0-9_-]{1,32}")
MAX_GROUP = 2**63 - 1
LEAK = "its text, or a translation of it, is in another split"


class CorpusConfig(Config):
    """Where the texts come from and how they are split."""

    path: UserPath | None = None
    """Parquet or JSON Lines (file, directory or glob) with `text`, optional `lang` and `group`; none: the demo's."""
    languages: list[str] = Field(default_factory=list)
    """Languages that must have text; none of the others is used. Empty: all there are."""
    validation_share: float = Field(default=0.005, gt=0, lt=0.5)
    """Share of the texts that training is validated on."""
    held_out_share: float = Field(default=0.01, gt=0, lt=0.5)
    """Share of the texts that the report is measured on."""
    max_characters: int = Field(default=20_000, ge=1)
    """Longer texts are quarantined."""


class Row(NamedTuple):
    """One row as found: a text, or the reason why it is none."""

    position: int
    text: str
    lang: str
    group: int
    reason: str = ""


def corpus_files(path: str) -> list[Path]:
    """The files that `path` names; DataError where there is none or the ending is unknown."""
    base = Path(path).expanduser()
    found = sorted(base.rglob("*")) if base.is_dir() else [Path(name) for name in sorted(glob.glob(str(base)))]
    files = [file for file in found if file.is_file() and not file.name.startswith((".", "_"))]
    if not files:
        raise DataError(f"corpus.path: {path!r}: no such file, directory or glob")
    known = [file for file in files if file.suffix in (".parquet", ".jsonl", ".json")]
    if not known or (not base.is_dir() and known != files):
        raise DataError(
            f"corpus.path: {files[0]}: unknown ending; expected .parquet, .jsonl or .json (one object a line)"
        )
    return known


def read_rows(file: Path) -> Iterator[Row]:
    """Every row of one file in order; DataError where the file is unreadable or has no `text`."""
    yield from _read_parquet(file) if file.suffix == ".parquet" else _read_json_lines(file)


def _read_parquet(path: Path) -> Iterator[Row]:
    try:
        parquet = pq.ParquetFile(path)
        names = parquet.schema_arrow.names
        if "text" not in names:
            raise DataError(f"{path}: no column 'text'; it has {names}")
        kind = parquet.schema_arrow.field("text").type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise DataError(f"{path}: column 'text' is {kind}; expected string")
        if "group" in names and not pa.types.is_integer(found := parquet.schema_arrow.field("group").type):
            raise DataError(f"{path}: column 'group' is {found}; expected integers (pandas: Int64, which may be null)")
        position = 0
        wanted = [name for name in ("text", "lang", "group") if name in names]
        for batch in parquet.iter_batches(READ_ROWS, columns=wanted):
            # As bytes, because a string column may hold bytes that are not UTF-8.
            raw = batch.column("text").cast(pa.large_binary()).to_pylist()
            langs = batch.column("lang").cast(pa.large_binary()).to_pylist() if "lang" in names else [None] * len(raw)
            groups = batch.column("group").to_pylist() if "group" in names else [None] * len(raw)
            for content, lang, group in zip(raw, langs, groups, strict=True):
                yield _row(position, content, lang, group)
                position += 1
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}") from error


def _read_json_lines(path: Path) -> Iterator[Row]:
    has_text = False
    try:
        with path.open("rb") as lines:
            for position, line in enumerate(lines):
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:
                    reason = "invalid UTF-8" if isinstance(error, UnicodeDecodeError) else "not JSON"
                    yield Row(
                        position, line[: EXCERPT_CHARACTERS * 4].decode(errors="replace"), UNKNOWN_LANGUAGE, -1, reason
                    )
                    continue
                if not isinstance(record, dict) or "text" not in record:
                    yield Row(position, _printable(str(record)), UNKNOWN_LANGUAGE, -1, "no 'text'")
                    continue
                has_text = True
                text = record["text"]
                content = text.encode(errors="surrogatepass") if isinstance(text, str) else text
                yield _row(position, content, record.get("lang"), record.get("group"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if not has_text:
        raise DataError(f"{path}: no line is a JSON object with 'text'")


def _row(position: int, content: Any, lang: Any, group: Any) -> Row:
    lang = lang.decode(errors="replace") if isinstance(lang, bytes) else lang
    lang = lang if isinstance(lang, str) and LANGUAGE_TAG.fullmatch(lang) else UNKNOWN_LANGUAGE
    group = group if isinstance(group, int) and 0 <= group <= MAX_GROUP else -1
    if content is None:
        return Row(position, "", lang, group, "null")
    if not isinstance(content, bytes):
        return Row(position, _printable(str(content)), lang, group, f"'text' is {type(content).__name__}")
    try:
        text = normalize("NFC", content.decode()).strip()
    except UnicodeDecodeError:
        return Row(position, content[: EXCERPT_CHARACTERS * 4].decode(errors="replace"), lang, group, "invalid UTF-8")
    return Row(position, text, lang, group, "" if text else "empty")


def _printable(text: str) -> str:
    """`text` without the lone surrogates that JSON can bring and Parquet cannot hold."""
    return text.encode(errors="replace").decode()


def split_corpus(config: CorpusConfig, directory: Path, seed: int = 0) -> dict[str, Any]:
    """Write train, validation, held_out and quarantine.parquet from the user's corpus; return the counts.

    Raises DataError where a split, or a language asked for, would be without text.
    """
    assert config.path is not None  # noqa: S101 (the caller chose the demo corpus otherwise)
    counts: Counter[str] = Counter()
    languages: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    with ExitStack() as stack:
        sinks = {
            name: stack.enter_context(_Sink(directory / f"{name}.parquet", CORPUS if name in SPLITS else QUARANTINE))
            for name in (*SPLITS, "quarantine")
        }
        for file in corpus_files(config.path):
            for row in read_rows(file):
                if config.languages and row.lang not in config.languages and not row.reason:
                    counts["other_language"] += 1
                    continue
                reason = row.reason or ("too long" if len(row.text) > config.max_characters else "")
                if reason:
                    reasons[reason] += 1
                    excerpt = row.text[:EXCERPT_CHARACTERS]
                    sinks["quarantine"].add((str(file), row.position, reason, excerpt))
                    continue
                split = _split_of(row, config, seed)
                sinks[split].add((counts[split], row.text, row.lang, row.group))
                counts[split] += 1
                languages[row.lang] += 1
    for split, others in (("validation", ("held_out",)), ("train", ("held_out", "validation"))):
        if leaks := _quarantine_leaks(directory, split, others):
            counts[split] -= leaks
            reasons[LEAK] += leaks
    if silent := [language for language in config.languages if not languages[language]]:
        raise DataError(f"corpus.languages: {silent}: no text in {config.path!r}; it has {sorted(languages)}")
    if empty := [name for name in SPLITS if not counts[name]]:
        raise DataError(
            f"corpus {config.path!r}: {languages.total()} usable texts leave {empty} empty "
            f"(quarantined: {dict(reasons)}); give more text or raise corpus.validation_share and held_out_share"
        )
    return {"splits": dict(counts), "sentences_by_language": dict(languages), "quarantined": dict(reasons)}


def _quarantine_leaks(directory: Path, split: str, others: Sequence[str]) -> int:
    """Move rows out of `split` whose text, or a translation of it, is in one of the others; return how many.

    Groups decide the split, and a text can be in two of them.
    """
    held = {
        _text_key(text)
        for name in others
        for batch in pq.ParquetFile(directory / f"{name}.parquet").iter_batches(READ_ROWS, columns=["text"])
        for text in batch["text"].to_pylist()
    }
    leaky, clean = directory / f"{split}.parquet", directory / f"{split}.clean.parquet"
    rows = [row for row in _rows_of(leaky) if _text_key(row[1]) in held]
    if not rows:
        return 0
    ids, groups = {row[0] for row in rows}, {row[3] for row in rows if row[3] >= 0}
    old = pq.read_table(directory / "quarantine.parquet").to_pylist()
    count = kept = 0
    with _Sink(clean, CORPUS) as sink, _Sink(directory / "quarantine.parquet", QUARANTINE) as quarantine:
        for row in old:
            quarantine.add(tuple(row.values()))
        for number, text, lang, group in _rows_of(leaky):
            if number in ids or group in groups:
                quarantine.add((split, number, LEAK, text[:EXCERPT_CHARACTERS]))
                count += 1
            else:
                sink.add((kept, text, lang, group))
                kept += 1
    clean.replace(leaky)
    return count


def _rows_of(path: Path) -> Iterator[tuple[int, str, str, int]]:
    for batch in pq.ParquetFile(path).iter_batches(READ_ROWS):
        yield from zip(*(batch[name].to_pylist() for name in ("id", "text", "lang", "group")), strict=True)


def _text_key(text: str) -> bytes:
    return hashlib.blake2b(text.casefold().encode(), digest_size=8).digest()


def _split_of(row: Row, config: CorpusConfig, seed: int) -> str:
    key = f"{seed}:{row.group}" if row.group >= 0 else f"{seed}:{row.text.casefold()}"
    share = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest()) / 2**64
    if share < config.validation_share:
        return "validation"
    return "held_out" if share < config.validation_share + config.held_out_share else "train"


class _Sink:
    """A Parquet file that rows are added to one by one and written in row groups."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.schema = schema
        self.writer = pq.ParquetWriter(path, schema, compression="zstd")
        self.rows: list[tuple[Any, ...]] = []

    def add(self, row: tuple[Any, ...]) -> None:
        self.rows.append(row)
        if len(self.rows) == READ_ROWS:
            self.flush()

    def flush(self) -> None:
        if self.rows:
            columns = [list(column) for column in zip(*self.rows, strict=True)]
            self.writer.write_table(
                pa.Table.from_arrays(
                    [pa.array(c, f.type) for c, f in zip(columns, self.schema, strict=True)], schema=self.schema
                )
            )
            self.rows = []

    def __enter__(self) -> "_Sink":
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()
        self.writer.close()


def texts_by_language(path: Path, max_texts: int, seed: int) -> dict[str, list[str]]:
    """Texts of a CORPUS file by language, at most `max_texts` of each, drawn by the seed; only those are held."""
    langs = pq.read_table(path, columns=["lang"])["lang"].combine_chunks().dictionary_encode()
    numbers = langs.indices.to_numpy()
    random = Random(seed)
    rows: dict[str, npt.NDArray[np.int64]] = {}
    is_drawn = np.zeros(len(numbers), np.bool_)
    for language, number in sorted(zip(langs.dictionary.to_pylist(), range(len(langs.dictionary)), strict=True)):
        found = np.flatnonzero(numbers == number)
        rows[language] = found if len(found) <= max_texts else found[random.sample(range(len(found)), max_texts)]
        is_drawn[rows[language]] = True
    drawn, start = [], 0
    for batch in pq.ParquetFile(path).iter_batches(READ_ROWS, columns=["text"]):
        drawn.append(batch["text"].filter(pa.array(is_drawn[start : start + len(batch)])).cast(pa.large_string()))
        start += len(batch)
    texts, places = pa.chunked_array(drawn, pa.large_string()), np.cumsum(is_drawn) - 1
    return {language: texts.take(pa.array(places[found])).to_pylist() for language, found in rows.items()}


def short_texts(path: Path, max_characters: int | None) -> npt.NDArray[np.bool_]:
    """Which rows of the CORPUS file `path` have texts of at most `max_characters` (none: all of them), (rows,)."""
    file = pq.ParquetFile(path)
    if max_characters is None:
        return np.ones(file.metadata.num_rows, np.bool_)
    batches = file.iter_batches(READ_ROWS, columns=["text"])
    return np.concatenate([pc.utf8_length(batch["text"]).to_numpy() <= max_characters for batch in batches])


def choose_texts(
    path: Path, directory: Path, max_texts: int, temperature: float, seed: int, max_characters: int | None = None
) -> int:
    """Write `texts.parquet`, at most `max_texts` rows of the CORPUS file `path` with new dense ids; return how many.

    A language's weight is (its share)**temperature: 1 keeps the corpus' balance, 0 gives every language the same. Texts
    of more than `max_characters` are left out.
    """
    langs = np.asarray(pq.read_table(path, columns=["lang"])["lang"].combine_chunks().dictionary_encode().indices)
    chosen = short_texts(path, max_characters)
    chosen[chosen] = _smoothed_sample(langs[chosen], max_texts, temperature, seed)
    start = 0
    with pq.ParquetWriter(directory / "texts.parquet", CORPUS, compression="zstd") as writer:
        for batch in pq.ParquetFile(path).iter_batches(READ_ROWS):
            mask = chosen[batch["id"].to_numpy()]
            kept = pa.Table.from_batches([batch], CORPUS).filter(pa.array(mask))
            ids = pa.array(np.arange(start, start + len(kept)), pa.int64())
            writer.write_table(kept.set_column(0, CORPUS.field("id"), ids), row_group_size=READ_ROWS)
            start += len(kept)
    return start


def _smoothed_sample(
    languages: npt.NDArray[np.integer], max_texts: int, temperature: float, seed: int
) -> npt.NDArray[np.bool_]:
    """Which rows to take, given each row's language number: exactly `max_texts`, or all where there are no more."""
    if max_texts >= len(languages):
        return np.ones(len(languages), dtype=bool)
    sizes = np.bincount(languages)
    shares = (sizes / sizes.sum()) ** temperature / np.maximum(sizes, 1)
    random = np.random.default_rng(seed)
    # The largest keys of a weighted draw without replacement (Efraimidis and Spirakis 2006).
    keys = np.log(random.random(len(languages))) / shares[languages]
    mask = np.zeros(len(languages), dtype=bool)
    mask[np.argpartition(-keys, max_texts)[:max_texts]] = True
    return mask
