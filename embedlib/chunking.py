"""Texts longer than a model reads: cut at token boundaries with overlap, and the chunks' vectors put together again."""

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

Pooling = Literal["mean", "max"]
# A chunk cut out of its text can have a few tokens more than it had within.
SPARE_TOKENS = 8


def split_long(tokenizer: Tokenizer, text: str, num_tokens: int, overlap: int) -> list[str]:
    """`text` in chunks of at most about `num_tokens`, each beginning `overlap` tokens before the last one ends.

    `tokenizer` must not truncate. A text that fits is its own only chunk.
    """
    offsets = tokenizer.encode(text, add_special_tokens=False).offsets
    if len(offsets) <= num_tokens:
        return [text]
    size = max(1, num_tokens - SPARE_TOKENS)
    step = max(1, size - overlap)
    starts = range(0, max(1, len(offsets) - overlap), step)
    return [text[offsets[start][0] : offsets[min(start + size, len(offsets)) - 1][1]] for start in starts]


def pool_chunks(
    vectors: npt.NDArray[np.floating[Any]], chunks_of_text: npt.NDArray[np.int64], pooling: Pooling
) -> npt.NDArray[np.floating[Any]]:
    """One vector a text, (texts, dim), of its chunks' `vectors` (chunks, dim), which follow each other by text.

    `chunks_of_text` (texts,) holds how many each text has, at least one.
    """
    starts = np.cumsum(chunks_of_text) - chunks_of_text
    if pooling == "max":
        return np.asarray(np.maximum.reduceat(vectors, starts, axis=0))
    return np.asarray(np.add.reduceat(vectors, starts, axis=0) / chunks_of_text[:, None], vectors.dtype)
