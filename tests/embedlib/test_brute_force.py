import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embedlib import gpu_search as module
from embedlib.brute_force import brute_force
from embedlib.gpu_search import on_gpu

CPU = torch.device("cpu")


def unit_vectors(num_rows: int, seed: int, dim: int = 24) -> npt.NDArray[np.float32]:
    raw = np.random.default_rng(seed).normal(size=(num_rows, dim)).astype(np.float32)
    return raw / np.linalg.norm(raw, axis=1, keepdims=True)


def expected(queries: npt.NDArray[np.float32], vectors: npt.NDArray[np.floating], k: int) -> list[list[int]]:
    scores = queries.astype(np.float64) @ vectors.astype(np.float64).T
    return np.sort(np.argsort(-scores, axis=1, kind="stable")[:, :k], axis=1).tolist()


def in_rows(found: npt.NDArray[np.int64]) -> list[list[int]]:
    return np.sort(found, axis=1).tolist()


@settings(max_examples=40)
@given(num_rows=st.integers(1, 400), k=st.integers(1, 150), seed=st.integers(0, 99), half=st.booleans())
def test_products_are_the_largest_in_any_blocks(num_rows: int, k: int, seed: int, half: bool) -> None:
    queries = unit_vectors(5, seed)
    vectors = unit_vectors(num_rows, seed + 100).astype(np.float16 if half else np.float32)
    wanted = expected(queries, vectors, k)
    assert in_rows(brute_force(queries, vectors, k, block_rows=70)) == wanted
    with pytest.MonkeyPatch.context() as patch:
        # What a GPU does, on the CPU: in blocks that are no multiples of a group.
        patch.setattr(module, "GPU_QUERIES", 2)
        patch.setattr(module, "GPU_ROWS", 150)
        assert in_rows(brute_force(queries, torch.from_numpy(vectors), k, block_rows=70)) == wanted


def test_a_query_is_the_sum_of_its_terms() -> None:
    queries = torch.from_numpy(unit_vectors(50, 0))
    assert len(list(module._as_sum(queries.half().float(), torch.float16))) == 1
    terms = list(module._as_sum(queries, torch.float16))
    assert len(terms) == 2
    assert float((sum(term.float() for term in terms) - queries).abs().max()) < 2**-22


def test_a_cpu_keeps_vectors_where_they_are() -> None:
    assert on_gpu(unit_vectors(3, 0), CPU) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: exact search on a GPU is not tested")
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_gpu_finds_what_double_precision_finds(dtype: type[np.floating]) -> None:
    queries, vectors = unit_vectors(300, 1, 384), unit_vectors(300_000, 2, 384).astype(dtype)
    resident = on_gpu(vectors, torch.device("cuda"))
    assert resident is not None
    found = in_rows(brute_force(queries, resident, 108, block_rows=1))
    wanted = expected(queries, vectors, 100)
    # The spare eight take up what single precision orders otherwise.
    assert all(set(some) <= set(row) for some, row in zip(wanted, found, strict=True))
