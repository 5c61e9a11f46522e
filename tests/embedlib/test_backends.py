"""The gate lets in what is near enough, "auto" takes the fastest of that; real runtimes where they are installed."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from embedlib.backends import (
    PACKAGES,
    BackendName,
    GateConfig,
    available_backends,
    choose_backend,
    load_encoder,
    measure,
    require_runtime,
)
from embedlib.batching import TokenIds
from embedlib.encoder import Encoder, Vectors, fast_dtype
from embedlib.errors import ConfigError
from embedlib.torch_model import TorchBackend

CPU = torch.device("cpu")
MODELS = ["tiny_encoder", "tiny_xlmr"]


def runtime_or_skip(name: str) -> None:
    for package in PACKAGES[name.split("-")[0]]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: backend {name} is not tested")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where exported models are kept: an export takes ten seconds and more."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", ["openvino-float32", pytest.param("onnx-float32", marks=pytest.mark.slow)])
def test_an_exported_model_gives_the_same_vectors(
    name: BackendName, model: str, tiny_texts: list[str], cache: Path, request: pytest.FixtureRequest
) -> None:
    runtime_or_skip(name)
    directory = request.getfixturevalue(model)
    expected = load_encoder(directory, "torch-float32", CPU, cache).encode(tiny_texts, "query")
    exported = set()
    for _ in range(2):  # exported, then from the cache
        encoder = load_encoder(directory, name, CPU, cache)
        np.testing.assert_allclose(encoder.encode(tiny_texts, "query"), expected, atol=1e-4)
        exported.add(len(list((cache / "exported").iterdir())))
    assert len(exported) == 1


@pytest.mark.parametrize(
    "name",
    ["openvino-bfloat16", *(pytest.param(f"{name}-int8", marks=pytest.mark.slow) for name in ("openvino", "onnx"))],
)
def test_a_coarser_arithmetic_is_near(
    name: BackendName, tiny_encoder: Path, tiny_texts: list[str], cache: Path
) -> None:
    runtime_or_skip(name)
    exact = load_encoder(tiny_encoder, "torch-float32", CPU, cache)
    tokens = exact.tokenise(tiny_texts)
    found = measure(load_encoder(tiny_encoder, name, CPU, cache), tokens, exact.encode_tokens(tokens)).agreement
    assert found.mean_cosine > 0.95
    # Without hardware for it OpenVINO computes bfloat16 as float32.
    assert found.mean_cosine < 1 - 1e-7 or (name == "openvino-bfloat16" and fast_dtype(CPU) == torch.float32)


class Noisy:
    """A backend whose vectors are off by a given amount."""

    max_threads = 1
    pads = False

    def __init__(self, encoder: Encoder, noise: float) -> None:
        self.name, self.compute, self.noise = "noisy", encoder.backend, noise
        assert isinstance(self.compute, TorchBackend)

    def pooled(self, batches: list[list[TokenIds]]) -> Vectors:
        vectors = self.compute.pooled(batches)
        return vectors + self.noise * np.random.default_rng(0).normal(size=vectors.shape).astype(np.float32)


def test_the_gate_decides(tiny_encoder: Path, tiny_texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    texts = list(dict.fromkeys(tiny_texts))[:100]

    def load(name: BackendName) -> Encoder:
        encoder = Encoder.load(tiny_encoder, CPU, torch.float32)
        noise = {"torch-float32": 0.0, "openvino-float32": 1e-4, "onnx-int8": 1.0}[name]
        if noise:
            encoder.backend = Noisy(encoder, noise)  # type: ignore[assignment]
        return encoder

    reference = load("torch-float32")
    gate, names = GateConfig(), ["torch-float32", "openvino-float32", "onnx-int8"]
    with pytest.raises(ConfigError, match="backend: onnx-int8 is too far from torch-float32: cosine 0"):
        choose_backend("onnx-int8", reference, texts, gate, load, names)  # type: ignore[arg-type]
    chosen, measured = choose_backend("openvino-float32", reference, texts, gate, load, names)  # type: ignore[arg-type]
    assert chosen == "openvino-float32"
    assert measured[chosen].agreement.mean_cosine > 0.999
    chosen, measured = choose_backend("auto", reference, texts, gate, load, names)  # type: ignore[arg-type]
    assert set(measured) == set(names)
    rates = [measured[name].texts_per_s for name in names[:2]]  # type: ignore[index]
    assert chosen == names[rates[1] >= 0.9 * max(rates)]


def test_a_runtime_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"onnx-int8 needs \['onnx', .*pip install 'embedlib\[onnx\]'"):
        require_runtime("onnx-int8", CPU)
    assert available_backends(CPU) == ["torch-float32", "torch-bfloat16"]
    monkeypatch.undo()
    monkeypatch.setitem(PACKAGES, "onnx", ("sys",))
    with pytest.raises(ConfigError, match="onnx-int8 runs on CPUs; this is cuda"):
        require_runtime("onnx-int8", torch.device("cuda"))


def test_an_exported_model_is_served_without_what_trains_models(
    tiny_encoder: Path, tiny_texts: list[str], cache: Path, tmp_path: Path
) -> None:
    """PyTorch and what stands on it are most of a process' start, and no replica waits for them."""
    runtime_or_skip("openvino-float32")
    expected = load_encoder(tiny_encoder, "openvino-float32", CPU, cache).encode(tiny_texts, "query")
    script = (
        "import sys, numpy, serve.deployment\n"
        "from pathlib import Path\n"
        "from embedlib.backends import load_encoder\n"
        f"encoder = load_encoder(Path({str(tiny_encoder)!r}), 'openvino-float32', 'cpu',"
        f" Path({str(cache)!r}))\n"
        f"numpy.save({str(tmp_path / 'vectors.npy')!r}, encoder.encode({tiny_texts!r}, 'query'))\n"
        "print({'torch', 'transformers', 'sentence_transformers', 'sklearn', 'scipy.stats'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
    np.testing.assert_allclose(np.load(tmp_path / "vectors.npy"), expected, atol=1e-5)
