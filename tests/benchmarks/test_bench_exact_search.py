import numpy as np
import torch

from benchmarks.exact_search import EMBEDLIB, K, nearest, searches, unit_vectors


def test_what_is_timed_finds_what_double_precision_finds() -> None:
    vectors, queries = unit_vectors(700, 16, 0), unit_vectors(9, 16, 1).float()
    found = searches(queries, vectors)[EMBEDLIB]()
    assert found.shape == (9, K)
    np.testing.assert_array_equal(np.sort(found), np.sort(nearest(queries, vectors)))
    assert torch.equal(unit_vectors(700, 16, 0), vectors)
