import faiss
import numpy as np
import pytest
import torch

from benchmarks import gpu_lists


def test_steps_are_measured_and_lists_searched_until_enough_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it on CPUs, which stand in for the GPU."""
    train = gpu_lists.train_index
    monkeypatch.setattr(gpu_lists, "train_index", lambda *arguments, on_gpu=False: train(*arguments))
    monkeypatch.setattr(gpu_lists, "adder", lambda index: index.add_with_ids)
    monkeypatch.setattr(gpu_lists, "lists_on_gpu", lambda index: faiss.clone_index(index))
    monkeypatch.setattr(gpu_lists, "GPU", torch.device("cpu"))
    vectors, queries = gpu_lists.vectors_of_chance(6000, 0), gpu_lists.vectors_of_chance(40, 1).astype(np.float32)
    np.testing.assert_allclose(np.linalg.norm(queries, axis=1), 1, atol=1e-2)
    measured = gpu_lists.measure(vectors, queries, "IVF64,SQ8", 1)
    assert measured["recall_at_10"] >= gpu_lists.MIN_RECALL
    assert measured["same_as_cpu"] == 1
    assert {(run["step"], run["where"]) for run in measured["runs"]} == {
        (step, where) for step in ("learn", "fill", "search") for where in ("gpu", "cpu")
    } | {("search", "exact, gpu")}
    assert all(ratio > 0 for ratio in measured["ratios"].values())
