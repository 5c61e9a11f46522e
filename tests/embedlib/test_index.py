from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import pytest

from embedlib.errors import ConfigError, DataError
from embedlib.index import _sample, build_index, write_index

VECTORS = np.random.default_rng(0).normal(size=(600, 16)).astype(np.float16)
IDS = np.arange(600) * 10 + 7


def parts() -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
    yield IDS[:250], VECTORS[:250]
    yield IDS[250:], VECTORS[250:]


@pytest.mark.parametrize("factory", ["Flat", "IVF2,Flat", "HNSW8"])
def test_an_index_finds_the_ids_by_inner_product(factory: str, tmp_path: Path) -> None:
    assert write_index(parts, tmp_path / "index.faiss", factory) == 600
    index = faiss.read_index(str(tmp_path / "index.faiss"))
    if isinstance(index, faiss.IndexIVF):
        index.nprobe = 2
    queries = VECTORS[:40].astype(np.float32)
    _, found = index.search(queries, 1)
    best = IDS[(queries @ VECTORS.astype(np.float32).T).argmax(axis=1)]
    assert (found[:, 0] == best).mean() >= 0.9
    assert [path.name for path in tmp_path.iterdir()] == ["index.faiss"]


@pytest.mark.parametrize("most", [1, 7, 100, 599, 600, 5000])
def test_an_index_learns_from_an_even_share_of_all_parts(most: int) -> None:
    numbered = [(IDS[first : first + 90], np.arange(600)[first : first + 90, None]) for first in range(0, 600, 90)]
    chosen = _sample(iter(numbered), most)[:, 0]
    assert len(chosen) == min(most, 600)
    assert len(set(chosen)) == len(chosen)
    if most > 1:
        gaps = np.diff(np.sort(chosen))
        assert gaps.max() <= 2 * 600 / most + 1
        assert chosen.min() < 600 / most
        assert chosen.max() > 600 - 2 * 600 / most - 1


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="index_factory: 'Nonsense'"):
        build_index(parts, "Nonsense")
    with pytest.raises(DataError, match="no vectors"):
        build_index(lambda: iter(()), "Flat")
    with pytest.raises(DataError, match="expected integers"):
        build_index(lambda: iter([(np.array(["a"]), VECTORS[:1])]), "Flat")
