"""Further rows of a table of positions, and the score of what was found with them."""

import numpy as np
import pytest
import torch

from benchmarks.long_input import METHODS, PARTS, Haystack, repeated, score, stretched

OLD = torch.arange(8.0)[:, None]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("added", [5, 24])
def test_every_way_gives_as_many_rows_as_are_asked_for(name: str, added: int) -> None:
    assert METHODS[name](OLD, added).shape == (added, 1)


def test_rows_are_stretched_or_repeated() -> None:
    assert stretched(0, 1)(OLD, 15).flatten().tolist() == pytest.approx([half / 2 for half in range(15)])
    assert stretched(1, 0)(OLD, 8).flatten().tolist() == pytest.approx(list(range(7, -1, -1)))
    assert repeated(0.5)(OLD, 6).flatten().tolist() == [4, 5, 6, 7, 4, 5]
    assert repeated(0, mirrored=True)(OLD, 10).flatten().tolist() == [7, 6, 5, 4, 3, 2, 1, 0, 0, 1]


def test_a_document_found_second_counts_less() -> None:
    documents = np.eye(3, dtype=np.float32)
    questions = np.array([[1, 0, 0], [0.5, 0.4, 0], [0, 0.1, 0.9]], np.float32)
    haystack = Haystack([""] * 3, [""] * 3, np.array([0, 1, 2]), np.arange(len(PARTS)))
    found = score("any", [haystack], [questions], [documents], 1.0)
    assert found.by_part == pytest.approx([1, 1 / np.log2(3), 1])
    assert found.ndcg == pytest.approx(np.mean(found.by_part))
