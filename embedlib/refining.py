"""Raw rows to clean ones, hashed and told apart: every row that does not stay has a reason, and all are counted."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, field_validator

from embedlib.config import Config
from embedlib.hashing import Hashes, Words, hash_pairs, hash_texts, loose_keys
from embedlib.languages import canonical, identify
from embedlib.quality import REASONS, QualityConfig, mask_personal, normalise, reasons
from embedlib.reading import EXCERPT_CHARACTERS
from embedlib.schemas import UNKNOWN_LANGUAGE
from embedlib.sentences import split_sentences

Product = Literal["corpus", "pairs", "query_passage"]
# Rows looked at together: their characters fit a core's cache.
ROWS_AT_ONCE = 8192
SAMPLES_A_REASON = 3
KEPT = ""

ROWS = pa.schema(
    [
        pa.field("high", pa.uint64(), nullable=False),
        pa.field("low", pa.uint64(), nullable=False),
        pa.field("text", pa.large_string(), nullable=False),
        pa.field("lang", pa.string(), nullable=False),
        pa.field("right", pa.large_string()),
        pa.field("right_lang", pa.string()),
        pa.field("source", pa.int32(), nullable=False),  # number of the source
        pa.field("group", pa.uint64()),  # hash of what its translations share; null: none is known
    ]
)
"""Clean rows on their way: hash, one or two texts, where they are from."""


class RefineConfig(Config):
    """What becomes of a row before it is compared with others."""

    product: Product = "corpus"
    """Texts alone; texts with translations; or queries with passages that answer them."""
    languages: list[str] = Field(default_factory=list)
    """Languages that stay; empty: all."""
    identify: Literal["missing", "check", "always", "never"] = "missing"
    """Which texts' language is identified: those that declare none; all, dropping what differs from the declared one;
    all, replacing it; none."""
    split_sentences: bool = False
    """Cut texts without translation into sentences."""
    repair: bool = True
    """Undo encodings that were misread (schÃ¶n)."""
    mask_personal: bool = False
    """Put <email>, <phone>, <ip>, <card>, <iban> and <url> for what may be somebody's."""
    quality: QualityConfig = QualityConfig()
    """What a text must be like."""
    key: Literal["exact", "loose"] = "exact"
    """Texts are equal if all of their characters are, or their letters and digits without regard to case."""
    seed: int = 0
    """Another one shuffles, splits and samples in another way."""

    @field_validator("languages")
    @classmethod
    def _without_regions(cls, languages: list[str]) -> list[str]:
        return [canonical(language) for language in languages]


class Unreadable(NamedTuple):
    """A row that is none."""

    row: int
    """Its number among the raw rows."""
    reason: str
    excerpt: str


class Refined(NamedTuple):
    """What a batch of raw rows came to."""

    rows: pa.Table
    """ROWS that stay, in the order of the raw rows."""
    tally: Counter[tuple[str, str]]
    """Texts by (language, reason); the reason KEPT is none."""
    unreadable: list[Unreadable]
    added: int
    """Texts beyond one a raw row: translations and further sentences."""
    samples: dict[str, list[str]]
    """Some of what was dropped, by reason."""


class _Texts(NamedTuple):
    """Texts that go the same way together."""

    texts: pa.Array
    langs: pa.Array
    hashes: Hashes
    drop: npt.NDArray[np.object_]
    """Why each is dropped, (texts,); KEPT where it is not."""


def evaluation_hashes(texts: Sequence[str], split: bool = False) -> Words:
    """What texts of evaluation sets, and with `split` each of their sentences, are recognised by, sorted."""
    texts = [*texts, *split_sentences(texts)[0]] if split else texts
    clean = normalise(pa.array(texts, pa.large_string()))
    return np.unique(hash_texts(loose_keys(clean), 0).high)


def refine(raw: pa.Table, config: RefineConfig, source: int, evaluation: Words) -> Refined:
    """Clean raw rows (of the schema RAW) of source number `source`; texts with a hash in `evaluation` are dropped."""
    pieces: list[pa.Table] = []
    whole = Refined(ROWS.empty_table(), Counter(), [], 0, {})
    added = 0
    for start in range(0, len(raw), ROWS_AT_ONCE):
        piece = _refine_batch(raw.slice(start, ROWS_AT_ONCE).combine_chunks(), config, source, evaluation)
        pieces.append(piece.rows)
        whole.tally.update(piece.tally)
        whole.unreadable.extend(each._replace(row=each.row + start) for each in piece.unreadable)
        added += piece.added
        for reason, some in piece.samples.items():
            whole.samples[reason] = [*whole.samples.get(reason, []), *some][:SAMPLES_A_REASON]
    return whole._replace(rows=pa.concat_tables(pieces) if pieces else whole.rows, added=added)


def _refine_batch(raw: pa.Table, config: RefineConfig, source: int, evaluation: Words) -> Refined:
    reason = raw["reason"].combine_chunks()
    unreadable = (
        [
            Unreadable(row, why, (text or "")[:EXCERPT_CHARACTERS])
            for row, (why, text) in enumerate(zip(reason.to_pylist(), raw["text"].to_pylist(), strict=True))
            if why
        ]
        if reason.null_count < len(reason)
        else []
    )
    if unreadable:
        raw = raw.filter(pc.is_null(raw["reason"])).combine_chunks()
    columns = {name: _column(raw[name]) for name in ("text", "lang", "right", "right_lang", "group")}
    refined = _refine_texts if config.product == "corpus" else _refine_pairs
    return refined(columns, config, source, evaluation)._replace(unreadable=unreadable)


def _column(chunked: pa.ChunkedArray) -> pa.Array:
    combined = chunked.combine_chunks()
    return combined if isinstance(combined, pa.Array) else pa.concat_arrays(combined.chunks)


def _refine_texts(columns: dict[str, pa.Array], config: RefineConfig, source: int, evaluation: Words) -> Refined:
    """Every text is a row of its own, a translation right behind what it translates."""
    num_raw = len(columns["text"])
    if config.split_sentences:
        columns = _split(columns)
    has_right = np.asarray(pc.is_valid(columns["right"]))
    lefts = _look_at(columns["text"], columns["lang"], config, evaluation)
    rights = _look_at(
        columns["right"].filter(pa.array(has_right)),
        columns["right_lang"].filter(pa.array(has_right)),
        config,
        evaluation,
    )
    partners = lefts.hashes.high[has_right]
    keep_apart = np.asarray(pc.equal(loose_keys(lefts.texts.filter(pa.array(has_right))), loose_keys(rights.texts)))
    rights.drop[keep_apart & (rights.drop == KEPT)] = "untranslated"
    groups, known = _groups(columns["group"], lefts.hashes, has_right, config.seed)
    order = np.argsort(
        np.concatenate([np.arange(len(has_right)) * 2, np.flatnonzero(has_right) * 2 + 1]), kind="stable"
    )
    both = {
        "high": np.concatenate([lefts.hashes.high, rights.hashes.high])[order],
        "low": np.concatenate([lefts.hashes.low, rights.hashes.low])[order],
        "text": pa.concat_arrays([lefts.texts, rights.texts]).take(pa.array(order)),
        "lang": pa.concat_arrays([lefts.langs, rights.langs]).take(pa.array(order)),
        "right": pa.nulls(len(order), pa.large_string()),
        "right_lang": pa.nulls(len(order), pa.string()),
        "source": np.full(len(order), source, np.int32),
        "group": pa.array(
            np.concatenate([groups, np.where(known[has_right], groups[has_right], partners)])[order],
            pa.uint64(),
            mask=~np.concatenate([known, np.ones(len(rights.texts), np.bool_)])[order],
        ),
    }
    drop = np.concatenate([lefts.drop, rights.drop])[order]
    return _told_apart(pa.table(list(both.values()), schema=ROWS), both["lang"], drop, len(order) - num_raw)


def _split(columns: dict[str, pa.Array]) -> dict[str, pa.Array]:
    """Rows of a sentence each, for texts that have no translation, which could not be cut at the same places."""
    alone = np.asarray(pc.is_null(columns["right"]))
    texts = [[text] for text in columns["text"].to_pylist()]
    for row in np.flatnonzero(alone).tolist():
        texts[row] = split_sentences(texts[row])[0]
    rows = pa.array(np.repeat(np.arange(len(texts)), [len(some) for some in texts]))
    split = {name: column.take(rows) for name, column in columns.items()}
    return split | {"text": pa.array([text for some in texts for text in some], pa.large_string())}


def _groups(
    names: pa.Array, lefts: Hashes, has_right: npt.NDArray[np.bool_], seed: int
) -> tuple[Words, npt.NDArray[np.bool_]]:
    """What each text shares with its translations, and whether it is known: a group's name, or the text itself."""
    named = np.asarray(pc.is_valid(names))
    groups = lefts.high.copy()
    if named.any():
        groups[named] = hash_texts(names.filter(pa.array(named)).cast(pa.large_string()), seed).high
    return groups, named | has_right


def _refine_pairs(columns: dict[str, pa.Array], config: RefineConfig, source: int, evaluation: Words) -> Refined:
    """A row is two texts; what one of them is dropped for, both are."""
    has_right = np.asarray(pc.is_valid(columns["right"]))
    filled = pc.fill_null(columns["right"], "")
    lefts = _look_at(columns["text"], columns["lang"], config, evaluation)
    rights = _look_at(filled, columns["right_lang"], config, evaluation)
    drop = np.where(lefts.drop == KEPT, rights.drop, lefts.drop)
    drop[np.asarray(pc.equal(loose_keys(lefts.texts), loose_keys(rights.texts))) & (drop == KEPT)] = "untranslated"
    drop[~has_right] = "no translation"
    hashes = hash_pairs(lefts.hashes, rights.hashes)
    arrays = [
        *(hashes.high, hashes.low, lefts.texts, lefts.langs, rights.texts, rights.langs),
        *(np.full(len(drop), source, np.int32), lefts.hashes.high),
    ]
    return _told_apart(pa.table(arrays, schema=ROWS), rights.langs, drop, 0)


def _look_at(texts: pa.Array, langs: pa.Array, config: RefineConfig, evaluation: Words) -> _Texts:
    """Clean and hash texts, settle their languages and find why some are to be dropped."""
    texts = normalise(texts.cast(pa.large_string()), config.repair)
    # Before anything is masked, which in the evaluation files it is not.
    loose = loose_keys(texts) if len(evaluation) else None
    if config.mask_personal:
        texts = mask_personal(texts)
    langs, differs = _languages(texts, langs, config)
    drop = np.array(REASONS, object)[reasons(texts, langs, config.quality)]
    _mark(drop, differs, "another language")
    if config.languages:
        _mark(drop, ~np.asarray(pc.is_in(langs, pa.array(config.languages))), "language not asked for")
    if loose is not None:
        _mark(drop, np.isin(hash_texts(loose, 0).high, evaluation), "in evaluation data")
    keys = texts
    if config.key == "loose":
        keys = loose_keys(texts) if loose is None or config.mask_personal else loose
    return _Texts(texts, langs, hash_texts(keys, config.seed), drop)


def _mark(drop: npt.NDArray[np.object_], holds: npt.NDArray[np.bool_], reason: str) -> None:
    chosen = np.flatnonzero(holds)
    drop[chosen[drop[chosen] == KEPT]] = reason


def _languages(texts: pa.Array, langs: pa.Array, config: RefineConfig) -> tuple[pa.Array, npt.NDArray[np.bool_]]:
    """The language of each text, and whether it is another than what was declared."""
    declared = _canonical(langs)
    no_difference = np.zeros(len(texts), np.bool_)
    unknown = np.asarray(pc.equal(declared, UNKNOWN_LANGUAGE))
    if config.identify == "never" or (config.identify == "missing" and not unknown.any()):
        return declared, no_difference
    chosen = unknown if config.identify == "missing" else np.ones(len(texts), np.bool_)
    found = pa.array(identify(texts.filter(pa.array(chosen)).to_pylist(), config.languages), pa.string())
    settled = pc.replace_with_mask(declared, pa.array(chosen), found)
    if config.identify == "check":
        return pc.if_else(pa.array(unknown), settled, declared), ~unknown & np.asarray(pc.not_equal(settled, declared))
    return settled, no_difference


def _canonical(langs: pa.Array) -> pa.Array:
    """Language codes without regions, "und" where there is none; each distinct one is looked at once."""
    coded = pc.fill_null(langs.cast(pa.string()), UNKNOWN_LANGUAGE).dictionary_encode()
    codes = pa.array([canonical(code) for code in coded.dictionary.to_pylist()], pa.string())
    return codes.take(coded.indices)


def _told_apart(rows: pa.Table, langs: pa.Array, drop: npt.NDArray[np.object_], added: int) -> Refined:
    """Those that stay, and what the others were dropped for."""
    stays = drop == KEPT
    tally = tally_of(langs, drop)
    samples: dict[str, list[str]] = {}
    for row in np.flatnonzero(~stays).tolist():
        some = samples.setdefault(drop[row], [])
        if len(some) < SAMPLES_A_REASON:
            some.append(excerpt_of(rows, row))
    return Refined(rows.filter(pa.array(stays)), tally, [], added, samples)


def tally_of(langs: pa.Array, why: Sequence[str] | npt.NDArray[np.object_]) -> Counter[tuple[str, str]]:
    """How many rows there are of each language and reason."""
    counted = pa.table([langs, pa.array(why, pa.string())], names=["lang", "reason"]).group_by(["lang", "reason"])
    counts: Any = counted.aggregate([([], "count_all")]).to_pydict()
    return Counter(dict(zip(zip(counts["lang"], counts["reason"], strict=True), counts["count_all"], strict=True)))


def excerpt_of(rows: pa.Table, row: int) -> str:
    """The beginning of a row's text, and of its translation."""
    texts = [rows[name][row].as_py() for name in ("text", "right")]
    return " ‖ ".join(text[:EXCERPT_CHARACTERS] for text in texts if text is not None)
