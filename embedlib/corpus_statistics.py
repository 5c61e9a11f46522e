"""What a built corpus is like: counted shard by shard, added up, and checked to the last row."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from tokenizers import Tokenizer

from embedlib.errors import ArtifactError
from embedlib.partitions import BEYOND_QUOTA, count_origins, language_column
from embedlib.refining import KEPT, SAMPLES_A_REASON

METADATA = b"embedlib.shard"
TOKENISED_AT_ONCE = 4096


class Statistics(NamedTuple):
    """Counts of one shard."""

    origins: list[tuple[int, str, int]]
    """Rows by source and language."""
    characters: dict[str, int]
    """Characters by language."""
    words: dict[str, int]
    """Words by language, as spaces part them."""
    tokens: dict[str, int]
    """Tokens by language; empty where no tokenizer was given."""
    lengths: dict[str, dict[str, int]]
    """Rows by language and by characters, rounded up to a power of two."""

    @classmethod
    def of(cls, rows: pa.Table, tokens: pa.Array) -> "Statistics":
        """The counts of ROWS, whose tokens have been counted, or are null."""
        langs = rows[language_column(rows)].combine_chunks()
        sides = ["text", "right"] if language_column(rows) == "right_lang" else ["text"]
        characters = sum(np.asarray(pc.utf8_length(rows[side])).astype(np.int64) for side in sides)
        words = sum(np.asarray(pc.count_substring(rows[side], " ")).astype(np.int64) + 1 for side in sides)
        edges = 2 ** np.ceil(np.log2(np.maximum(characters, 1))).astype(np.int64)
        lengths: dict[str, dict[str, int]] = {}
        counted = pa.table([langs, pa.array(edges)], names=["lang", "edge"]).group_by(["lang", "edge"])
        for row in (
            counted.aggregate([([], "count_all")]).sort_by([("lang", "ascending"), ("edge", "ascending")]).to_pylist()
        ):
            lengths.setdefault(row["lang"], {})[str(row["edge"])] = row["count_all"]
        return cls(
            count_origins(rows),
            _sums(langs, characters),
            _sums(langs, words),
            _sums(langs, np.asarray(tokens).astype(np.int64)) if tokens.null_count == 0 and len(tokens) else {},
            lengths,
        )

    @classmethod
    def parse(cls, metadata: Mapping[bytes, bytes]) -> "Statistics":
        """The counts that a shard carries."""
        return cls(**json.loads(metadata[METADATA]))

    @property
    def metadata(self) -> dict[bytes, str]:
        """The counts as a shard carries them."""
        return {METADATA: json.dumps(self._asdict(), ensure_ascii=False)}


def _sums(langs: pa.Array, values: Any) -> dict[str, int]:
    table = pa.table([langs, pa.array(values)], names=["lang", "value"]).group_by("lang")
    rows = table.aggregate([("value", "sum")]).sort_by("lang").to_pylist()
    return {row["lang"]: row["value_sum"] for row in rows}


@cache
def _tokenizer(file: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def token_counts(rows: pa.Table, file: Path | None) -> pa.Array:
    """Tokens of each row, both of its texts, without special ones; null without a tokenizer."""
    if not file:
        return pa.nulls(len(rows), pa.int32())
    counts: npt.NDArray[np.int32] = np.zeros(len(rows), np.int32)
    for side in ("text", "right"):
        texts = rows[side].to_pylist()
        for start in range(0, len(texts), TOKENISED_AT_ONCE):
            some = [text or "" for text in texts[start : start + TOKENISED_AT_ONCE]]
            encoded = _tokenizer(file).encode_batch_fast(some, add_special_tokens=False)
            counts[start : start + len(some)] += np.array([len(each) for each in encoded], np.int32)
    return pa.array(counts)


def measurements_of(
    reading: Sequence[Mapping[str, Any]],
    part_sources: Sequence[str],
    settled: Sequence[Mapping[str, Any]],
    written: Sequence[Statistics],
    names: Sequence[str],
) -> dict[str, Any]:
    """Everything counted, added up; ArtifactError where a row is unaccounted for.

    `reading` is told by the parts of the input, `settled` by the partitions, `written` by the shards.
    """
    counts: Counter[tuple[str, str, str]] = Counter()
    quarantined: Counter[tuple[str, str]] = Counter()
    samples: dict[str, list[str]] = {}
    for part, source in zip(reading, part_sources, strict=True):
        for lang, reason, count in part["tally"]:
            counts[source, lang, reason] += count
        quarantined.update({(source, reason): count for reason, count in part["quarantined"].items()})
        for reason, some in part["samples"].items():
            samples[reason] = [*samples.get(reason, []), *some][:SAMPLES_A_REASON]
    for partition in settled:
        for number, lang, reason, count in partition["dropped"]:
            counts[names[number], lang, reason] += count
            counts[names[number], lang, KEPT] -= count
    kept: Counter[tuple[str, str]] = Counter()
    for shard in written:
        for number, lang, count in shard.origins:
            kept[names[number], lang] += count
    for source, lang, reason in list(counts):
        if reason == KEPT and (beyond := counts[source, lang, KEPT] - kept[source, lang]):
            counts[source, lang, BEYOND_QUOTA] += beyond
            counts[source, lang, KEPT] -= beyond
    rows, added = sum(part["rows"] for part in reading), sum(part["added"] for part in reading)
    _require_all(rows + added, counts, quarantined, kept)
    reasons: Counter[str] = Counter()
    for (_, _, reason), count in counts.items():
        reasons[reason] += count
    return {
        "rows": rows,
        "added": added,
        "kept": kept.total(),
        "shards": len(written),
        "reasons": {reason: count for reason, count in reasons.most_common() if reason != KEPT and count},
        "quarantined": _by_reason(quarantined),
        "counts": [
            {"source": source, "lang": lang, "reason": reason or "kept", "rows": count}
            for (source, lang, reason), count in sorted(counts.items())
            if count
        ],
        "quarantined_by_source": [
            {"source": source, "reason": reason, "rows": count}
            for (source, reason), count in sorted(quarantined.items())
        ],
        "languages": _languages(written),
        "samples": dict(sorted(samples.items())),
    }


def _require_all(
    rows: int,
    counts: Counter[tuple[str, str, str]],
    quarantined: Counter[tuple[str, str]],
    kept: Counter[tuple[str, str]],
) -> None:
    told = counts.total() + quarantined.total()
    negative = [key for key, count in counts.items() if count < 0]
    if told != rows or negative or kept.total() != sum(count for key, count in counts.items() if key[2] == KEPT):
        raise ArtifactError(
            f"corpus: {rows} texts were read, but {kept.total()} are kept and {told - kept.total()} dropped or "
            f"quarantined{f', less than none of {negative[0]}' if negative else ''}; delete work/ and build it again"
        )


def _by_reason(counts: Mapping[tuple[str, str], int]) -> dict[str, int]:
    reasons: Counter[str] = Counter()
    for (_, reason), count in counts.items():
        reasons[reason] += count
    return dict(reasons.most_common())


def _languages(written: Sequence[Statistics]) -> dict[str, dict[str, Any]]:
    """Rows, characters, words, tokens and lengths of each language, the largest first."""
    found: dict[str, dict[str, Any]] = {}
    for shard in written:
        for _, lang, count in shard.origins:
            some = found.setdefault(lang, {"rows": 0, "characters": 0, "words": 0, "tokens": 0, "lengths": Counter()})
            some["rows"] += count
        for name in ("characters", "words", "tokens"):
            for lang, count in getattr(shard, name).items():
                found[lang][name] += count
        for lang, lengths in shard.lengths.items():
            found[lang]["lengths"].update(lengths)
    ordered = sorted(found.items(), key=lambda item: (-item[1]["rows"], item[0]))
    return {
        lang: some | {"lengths": {edge: some["lengths"][edge] for edge in sorted(some["lengths"], key=int)}}
        for lang, some in ordered
    }
