import os
import sys
import threading
import types
from collections.abc import Iterator

import pytest
import torch

from embedlib.threads import cores, in_threads, side_by_side, use_cores


@pytest.fixture
def four_cores() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("pieces", "max_threads", "cores_each"), [(1, 8, 4), (2, 8, 2), (3, 8, 1), (9, 8, 1), (9, 2, 2), (9, 1, 4)]
)
def test_the_cores_are_shared(four_cores: None, pieces: int, max_threads: int, cores_each: int) -> None:
    found = side_by_side(lambda piece: (piece, torch.get_num_threads()), range(pieces), max_threads)
    assert found == [(piece, cores_each) for piece in range(pieces)]
    assert torch.get_num_threads() == 4


def test_pieces_run_at_the_same_time(four_cores: None) -> None:
    together = threading.Barrier(3, timeout=10)
    assert sorted(side_by_side(lambda _: together.wait(), range(3), 3)) == [0, 1, 2]


def test_an_error_comes_through_and_the_cores_come_back(four_cores: None) -> None:
    def fail(piece: int) -> None:
        raise ValueError(f"piece {piece}")

    with pytest.raises(ValueError, match="piece 0"):
        side_by_side(fail, range(3), 3)
    assert torch.get_num_threads() == 4
    assert side_by_side(str, [], 3) == []


def test_the_cores_are_known_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch")
    for limit, expected in (("", os.cpu_count()), ("3", 3), ("4,2", 4), ("all", os.cpu_count())):
        monkeypatch.setenv("OMP_NUM_THREADS", limit)
        assert cores() == expected
    use_cores(5)
    assert cores() == 5
    monkeypatch.setitem(sys.modules, "torch", types.ModuleType("torch"))  # as while it is imported
    assert cores() == 5
    use_cores(6)
    assert in_threads(lambda _: cores(), range(3), 3) == [6] * 3
