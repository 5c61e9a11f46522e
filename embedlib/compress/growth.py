"""New pieces for texts that a student's tokenizer cuts small, and their rows, made from the teacher's.

The `tokenizers` trainer proposes pieces from the texts; those stay whose loss would cost the most tokens, by the measure
that chose the kept ones. They come after all others: a text that uses none of them is cut and embedded as before.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from scipy import sparse
from scipy.sparse.linalg import svds
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from tokenizers.trainers import UnigramTrainer

from embedlib.compress.tokenizer import BYTE_PIECES, build_model, read_pieces
from embedlib.compress.vocab import Floats, Ints, count_pieces, count_words, prune, segment, word_weights
from embedlib.config import Config
from embedlib.errors import ConfigError

RowMethod = Literal["spelling", "contexts"]
PROPOSED = 2
"""Pieces that the trainer proposes, for each one known or asked for."""
TIE_STEP = 1e-4
"""What the trainer puts between the scores of pieces that it must keep though no text needs them."""
WINDOW, CONTEXT_SMOOTHING, MAX_DIMENSIONS = 4, 0.75, 128
NEAREST, TEMPERATURE = 10, 0.1


class GrowthConfig(Config):
    """Pieces that the teacher's tokenizer need not have."""

    num_pieces: int = Field(default=0, ge=0)
    """New pieces beside `vocabulary.size`."""
    languages: list[str] = Field(default_factory=list)
    """Whose texts they shorten; none: those of all languages."""


class NewPieces(NamedTuple):
    """Pieces to add to a tokenizer."""

    texts: list[str]
    """Descending by score."""
    scores: list[float]
    """Log-probabilities on the teacher's scale."""
    growth: dict[str, float]
    """Tokens with them relative to those without, minus one, by language."""


def choose_new_pieces(
    teacher: Tokenizer,
    pruned: Tokenizer,
    texts_by_language: Mapping[str, Sequence[str]],
    num_pieces: int,
    temperature: float,
) -> NewPieces:
    """The `num_pieces` that `pruned` lacks and that save the most tokens on the texts, prompts included.

    A piece that the teacher has keeps its score; `temperature` smooths the languages' shares of tokens. Raises
    ConfigError for a tokenizer without Unigram's scores, and where the texts do not yield so many pieces.
    """
    kept, known = read_pieces(pruned), read_pieces(teacher)
    if kept.kind != "Unigram":
        raise ConfigError(f"grow.num_pieces: {num_pieces}; expected 0 for a tokenizer of the kind {kept.kind}")
    counted = count_words(pruned, texts_by_language)
    lengths, ids = segment(pruned.model, counted.words)
    tokens = counted.per_language(lengths)
    proposed = _propose(pruned, texts_by_language, PROPOSED * (num_pieces + len(np.unique(ids))))
    teacher_scores = dict(zip(known.texts, known.scores, strict=True))
    shared = [text for text in proposed if text in teacher_scores]
    shares = np.exp([proposed[text] for text in shared])
    # The trainer's probabilities are of these texts alone, the teacher's of all its languages.
    distances = np.array([teacher_scores[text] - proposed[text] for text in shared])
    shift = float(distances @ shares / shares.sum()) if shared else 0.0
    lacking = {
        text: teacher_scores.get(text, score + shift)
        for text, score in proposed.items()
        if pruned.token_to_id(text) is None
    }
    if len(lacking) < num_pieces:
        raise ConfigError(f"grow.num_pieces: {num_pieces}; the texts yield {len(lacking)}, expected no more")

    size = len(kept.texts)
    candidates = kept._replace(texts=kept.texts + list(lacking), scores=kept.scores + list(lacking.values()))
    spellings = [index for index in range(size) if kept.texts[index] not in BYTE_PIECES]
    lengths, ids = segment(add_pieces(pruned, lacking).model, counted.words)
    counts = count_pieces(lengths, ids, word_weights(counted, tokens, temperature), len(candidates.texts))
    chosen = prune(candidates, spellings, list(range(size, len(candidates.texts))), counts, num_pieces)
    new = sorted(((candidates.texts[index], candidates.scores[index]) for index in chosen), key=lambda it: (-it[1], it))
    after = counted.per_language(segment(add_pieces(pruned, dict(new)).model, counted.words)[0])
    growth = {language: after[language] / before - 1 for language, before in tokens.items()}
    return NewPieces([text for text, _ in new], [score for _, score in new], growth)
