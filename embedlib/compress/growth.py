"""Pieces that a Unigram teacher lacks, for languages that it splits badly, and rows for them.

A Unigram model of the language's own texts proposes them. They then stand for choice beside the teacher's pieces, so
that those stay in the student that save the most tokens for the room there is.
"""

import json
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from tokenizers.trainers import UnigramTrainer

from embedlib.compress.tokenizer import BYTE_PIECES, Pieces, read_pieces
from embedlib.errors import ConfigError

DECIMALS = 3


def grow_tokenizer(
    teacher: Tokenizer, texts_by_language: Mapping[str, Sequence[str]], num_pieces: Mapping[str, int]
) -> Tokenizer:
    """The Unigram tokenizer `teacher` with further pieces after its own, from models of `num_pieces` pieces each.

    Texts must be without prompts, which are to be cut as before. Pieces with a character unknown to the teacher are
    left out: it has no vector to teach for them. Raises ConfigError for a language without texts, or a teacher other
    than Unigram.
    """
    pieces = read_pieces(teacher)
    if not pieces.falls_back_to_bytes:
        raise ConfigError(f"vocabulary.new_pieces: the teacher's tokenizer is {pieces.kind}; expected Unigram")
    known, alphabet = {*pieces.texts, *BYTE_PIECES}, {text for text in pieces.texts if len(text) == 1}
    scores: dict[str, float] = {}
    for language, number in num_pieces.items():
        if not texts_by_language.get(language):
            raise ConfigError(
                f"vocabulary.new_pieces: {language!r} has no texts; expected some of {', '.join(texts_by_language)}"
            )
        own = _train(teacher, texts_by_language[language], number)
        lower = _difference(own, pieces)
        for text, score in zip(own.texts, own.scores, strict=True):
            if text not in known and alphabet.issuperset(text):
                # Rounded, since the trainer's threads add up in an order of chance.
                scores[text] = max(round(score + lower, DECIMALS), scores.get(text, -np.inf))
    state = json.loads(teacher.to_str())
    state["model"]["vocab"] += sorted(scores.items(), key=lambda item: (-item[1], item[0]))
    return Tokenizer.from_str(json.dumps(state))


def _train(teacher: Tokenizer, texts: Sequence[str], size: int) -> Pieces:
    """A Unigram model of `texts`, normalised and cut into words as `teacher` does."""
    model = Tokenizer(Unigram())
    if teacher.normalizer:
        model.normalizer = teacher.normalizer
    if teacher.pre_tokenizer:
        model.pre_tokenizer = teacher.pre_tokenizer
    pieces = read_pieces(teacher)
    unknown = pieces.texts[pieces.unknown]
    trainer = UnigramTrainer(vocab_size=size, special_tokens=[unknown], unk_token=unknown, show_progress=False)
    model.train_from_iterator(texts, trainer)
    return read_pieces(model)


def _difference(own: Pieces, old: Pieces) -> float:
    """Mean log-probability in `old` minus that in `own`, over the pieces of both as often as `own` uses them.

    The teacher's model is of many languages, so one language's pieces are all less likely in it. With this added, a new
    piece wins where it is likelier than what spells it now, and no more often.
    """
    before = dict(zip(old.texts, old.scores, strict=True))
    known = [index for index, text in enumerate(own.texts) if text in before and index != own.unknown]
    if not known:
        return 0.0
    ours = np.array([own.scores[index] for index in known])
    theirs = np.array([before[own.texts[index]] for index in known])
    return float(np.average(theirs - ours, weights=np.exp(ours)))


def spelling_rows(embedding: torch.Tensor, teacher: Tokenizer, texts: Sequence[str]) -> torch.Tensor:
    """For each of `texts`, pieces that `teacher` lacks, the mean (texts, dim) of the rows of those that spell it."""
    encodings = Tokenizer(teacher.model).encode_batch_fast(list(texts), add_special_tokens=False)
    return torch.stack([embedding[torch.tensor(encoding.ids)].mean(0) for encoding in encodings])
