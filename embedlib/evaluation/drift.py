"""How far a model has moved from a baseline on texts without labels: as a whole, by language and by length."""

import re
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from embedlib.config import Config
from embedlib.encoder import Encoder
from embedlib.metrics import Vectors, k_nearest_shared, mean_cosine, similarity_spearman

NEIGHBOURS = 10
LEAST_TEXTS = 30
WORST_TEXTS = 10
# Longest texts of a bucket, in characters.
LENGTHS = (20, 40, 80, 160, 320, 640)
WORD = re.compile(r"\w+")
# Written without spaces: a character stands for a word.
UNSPACED = {"zh", "ja", "th", "lo", "km", "my", "bo", "yue"}


class Agreement(Config):
    """How alike two models see the same texts."""

    texts: int
    """How many."""
    spearman: float
    """Rank correlation of the two models' similarities over pairs of texts."""
    top_k_overlap: float
    """Share of a text's ten nearest that are the same in both models."""
    cosine: float | None = None
    """Mean cosine between the two models' vectors of a text; none where they differ in dimensions."""


class MovedText(Config):
    """A text whose neighbours have changed."""

    text: str
    """Its beginning."""
    lang: str
    """Its language."""
    shared: float
    """Share of its ten nearest that are the same in both models."""


class Drift(Config):
    """A model against a baseline on texts without labels."""

    whole: Agreement
    """All texts."""
    languages: dict[str, Agreement]
    """By language, of those with enough texts."""
    lengths: dict[str, Agreement]
    """By length in characters, of those with enough texts."""
    worst: list[MovedText]
    """The texts whose neighbours have changed most."""


class Fertility(Config):
    """Tokens that a model reads a word as, by language; a character is a word where a script has no spaces."""

    languages: dict[str, float]
    """By language."""
    unknown: float
    """Share of tokens that are unknown."""


def measure_drift(model: Vectors, baseline: Vectors, texts: Sequence[str], langs: Sequence[str]) -> Drift:
    """How vectors (texts, dim) of a model differ from the baseline's; neighbours are looked for among all texts."""
    shared = k_nearest_shared(model, baseline, NEIGHBOURS)
    lengths = [bucket(text) for text in texts]
    order = np.argsort(shared, kind="stable")[:WORST_TEXTS]
    return Drift(
        whole=agreement(model, baseline, shared),
        languages=agreements(model, baseline, shared, langs),
        lengths=agreements(model, baseline, shared, lengths),
        worst=[MovedText(text=texts[row][:160], lang=langs[row], shared=float(shared[row])) for row in order],
    )


def agreements(
    model: Vectors, baseline: Vectors, shared: npt.NDArray[np.float64], labels: Sequence[str]
) -> dict[str, Agreement]:
    """Agreement among the texts of each label that has enough of them."""
    found = np.array(labels)
    rows = {label: np.flatnonzero(found == label) for label in dict.fromkeys(sorted(labels, key=natural))}
    return {
        label: agreement(model[chosen], baseline[chosen], shared[chosen])
        for label, chosen in rows.items()
        if len(chosen) >= LEAST_TEXTS
    }


def agreement(model: Vectors, baseline: Vectors, shared: npt.NDArray[np.float64]) -> Agreement:
    """Agreement on these texts."""
    return Agreement(
        texts=len(model),
        spearman=similarity_spearman(model, baseline),
        top_k_overlap=float(shared.mean()),
        cosine=mean_cosine(model, baseline) if model.shape == baseline.shape else None,
    )


def bucket(text: str) -> str:
    """The length bucket of a text."""
    above = [0, *LENGTHS]
    place = int(np.searchsorted(LENGTHS, len(text)))
    return f"{above[place] + 1}–{LENGTHS[place]}" if place < len(LENGTHS) else f"over {LENGTHS[-1]}"


def natural(label: str) -> tuple[int, str]:
    """Sorts `21–40` before `161–320` and words by their letters."""
    number = re.match(r"\d+", label)
    return (int(number[0]) if number else 1 << 30, label)


def measure_fertility(encoder: Encoder, texts: Sequence[str], langs: Sequence[str]) -> Fertility:
    """Tokens a word, special tokens not counted."""
    # Uncut: words are counted over whole texts, too.
    tokens = [np.array(each.ids) for each in encoder.whole_texts.encode_batch_fast(list(texts))]
    special = len(encoder.whole_texts.encode("").ids)
    unknown = encoder.unknown_token_id
    counts: dict[str, tuple[int, int]] = {}
    for ids, text, lang in zip(tokens, texts, langs, strict=True):
        read, words = counts.get(lang, (0, 0))
        counts[lang] = read + len(ids) - special, words + words_of(lang)(text)
    return Fertility(
        languages={lang: read / words for lang, (read, words) in sorted(counts.items()) if words},
        unknown=float(np.mean(np.concatenate(tokens) == unknown)),
    )


def words_of(lang: str) -> Callable[[str], int]:
    """What counts the words of a text in a language."""
    if lang in UNSPACED:
        return lambda text: sum(map(len, WORD.findall(text)))
    return lambda text: len(text.split())
