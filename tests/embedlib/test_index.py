from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import pytest

from embedlib.errors import ConfigError, DataError
from embedlib.index import build_index, write_index

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


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="index_factory: 'Nonsense'"):
        build_index(parts, "Nonsense")
    with pytest.raises(DataError, match="no vectors"):
        build_index(lambda: iter(()), "Flat")
    with pytest.raises(DataError, match="expected integers"):
        build_index(lambda: iter([(np.array(["a"]), VECTORS[:1])]), "Flat")
