from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from embedlib.batching import TokenIds
from embedlib.dataset import ContrastiveSet, DistillationSet, several_answers, write_tokens, write_vectors
from embedlib.errors import DataError

TOKENS = [np.arange(length, dtype=np.int32) + 10 * length for length in (3, 1, 5, 2, 4)]
VECTORS = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float16)


def write(directory: Path, order: list[int]) -> DistillationSet:
    write_tokens(directory, 5, [TOKENS[:2], TOKENS[2:]])
    ids = np.array(order)
    write_vectors(directory, 5, 6, [(ids[:3], VECTORS[ids[:3]]), (ids[3:], VECTORS[ids[3:]])])
    return DistillationSet.open(directory)


def test_what_is_written_is_read_mapped(tmp_path: Path) -> None:
    dataset = write(tmp_path, [4, 0, 2, 1, 3])
    assert len(dataset) == 5
    assert all(isinstance(array, np.memmap) and not array.flags.writeable for array in dataset)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["offsets.npy", "tokens.npy", "vectors.npy"]
    rows = np.array([3, 0, 2])
    assert dataset.lengths(rows).tolist() == [2, 3, 5]
    tokens, vectors = dataset.samples(rows)
    assert [sequence.tolist() for sequence in tokens] == [TOKENS[row].tolist() for row in rows]
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors, torch.from_numpy(VECTORS[rows].astype(np.float32)), rtol=0, atol=0)


@given(st.lists(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=5), min_size=1, max_size=8))
def test_a_set_in_memory_holds_its_samples(sequences: list[list[int]]) -> None:
    tokens: list[TokenIds] = [np.array(sequence, np.int32) for sequence in sequences]
    dataset = DistillationSet.of(tokens, np.zeros((len(tokens), 2), np.float16))
    read, _ = dataset.samples(np.arange(len(tokens)))
    assert [sequence.tolist() for sequence in read] == sequences
    assert dataset.lengths(np.arange(len(tokens))).tolist() == [len(sequence) for sequence in sequences]


def test_token_ids_of_the_wrong_number_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="got 5 token sequences; expected 6"):
        write_tokens(tmp_path, 6, [TOKENS])


def test_too_many_token_ids_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected 4"):
        write_tokens(tmp_path, 4, [TOKENS])


@pytest.mark.parametrize(
    ("ids", "missing", "repeated"), [([0, 1, 2, 3], 1, 0), ([0, 1, 2, 3, 3], 1, 1), ([0, 1, 2, 3, 4, 4, 4], 0, 1)]
)
def test_missing_and_repeated_ids_are_refused(tmp_path: Path, ids: list[int], missing: int, repeated: int) -> None:
    with pytest.raises(DataError, match=f"of 5 samples: {missing} missing, {repeated} repeated"):
        write_vectors(tmp_path, 5, 6, [(np.array([row]), VECTORS[[row]]) for row in ids])


def test_vectors_that_are_not_wanted_are_zeros(tmp_path: Path) -> None:
    wanted = np.array([1, 4])
    write_vectors(tmp_path, 5, 6, [(wanted, VECTORS[wanted])], wanted)
    found = np.load(tmp_path / "vectors.npy")
    assert np.array_equal(found[wanted], VECTORS[wanted])
    assert not found[[0, 2, 3]].any()
    with pytest.raises(DataError, match="1 missing, 0 repeated"):
        write_vectors(tmp_path, 5, 6, [(wanted[:1], VECTORS[wanted[:1]])], wanted)


def test_a_batch_knows_what_else_answers_its_queries() -> None:
    samples = np.array([[0, 10], [0, 11], [1, 11], [2, 12], [2, 13], [2, 12]])
    answers = several_answers(samples)
    assert answers.tolist() == [[0, 10], [0, 11], [2, 12], [2, 13]]
    assert several_answers(samples[:0]).shape == (0, 2)
    dataset = ContrastiveSet(
        np.zeros(14, np.int32), np.arange(15), samples, np.zeros(6, np.int64), np.ones(1), answers=answers
    )
    texts, batch = dataset.batch(np.array([0, 2, 3]), torch.device("cpu"))
    assert texts.tolist() == [0, 1, 2, 10, 11, 12]
    assert batch.answers is not None
    # Text 11, the positive of query 1, answers query 0 as well; 13 is not in the batch.
    assert [[int(texts[place]) for place in pair] for pair in batch.answers] == [[0, 10], [0, 11], [2, 12]]
