"""Runtimes that compute a model in PyTorch's stead, each let in only where its vectors are near enough.

A backend is exported once, kept in a cache by the model's fingerprint, and measured against float32 on a sample of the
user's own texts before it is used: a quick runtime that ranks other neighbours is no gain.
"""

import importlib.util
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
from pydantic import Field
from tokenizers import Tokenizer

from embedlib.artifact import model_fingerprint
from embedlib.batching import TokenIds, padded
from embedlib.config import Config
from embedlib.encoder import Encoder, Vectors, device_type
from embedlib.errors import ConfigError
from embedlib.metrics import row_cosines, top_k_overlap
from embedlib.threads import cores, in_threads
from embedlib.traits import TOKENIZER_NAME, TRAITS_NAME, Traits

if TYPE_CHECKING:
    import torch

BackendName = Literal[
    "torch-float32",
    "torch-bfloat16",
    "torch-float16",
    "openvino-float32",
    "openvino-bfloat16",
    "openvino-int8",
    "onnx-float32",
    "onnx-int8",
]
REFERENCE: BackendName = "torch-float32"
PACKAGES = {"openvino": ("openvino", "nncf"), "onnx": ("onnx", "onnxscript", "onnxruntime")}
RUNS = 3
# Two measurements of one backend differ by as much.
NEARLY = 0.9
# Activations that share a scale. On multilingual-e5-small, 4-bit: 32 gave a top-10 overlap of 0.966 at 316 texts/s,
# 64 0.958 at 355, 128 0.948 at 389.
INT8_GROUP = "64"


class GateConfig(Config):
    """How near a backend's vectors must be to float32's on the sample."""

    mean_cosine: float = Field(default=0.99, ge=-1, le=1)
    """Least mean cosine of a text's two vectors."""
    min_cosine: float = Field(default=0.95, ge=-1, le=1)
    """Least cosine of any text's two vectors."""
    top_10_overlap: float = Field(default=0.95, ge=0, le=1)
    """Least mean share of a text's ten nearest that are the same."""


class Agreement(NamedTuple):
    """How near vectors are to those of float32."""

    mean_cosine: float
    min_cosine: float
    top_10_overlap: float

    @classmethod
    def of(cls, vectors: Vectors, reference: Vectors) -> "Agreement":
        """Of vectors (texts, dim) with the reference's for the same texts."""
        cosines = row_cosines(vectors, reference)
        k = min(10, len(vectors) - 1)  # a text of a small sample has no more neighbours
        overlap = top_k_overlap(vectors, reference, k) if k else 1.0
        return cls(float(cosines.mean()), float(cosines.min()), overlap)

    def passes(self, gate: GateConfig) -> bool:
        """Whether they are near enough."""
        return (
            self.mean_cosine >= gate.mean_cosine
            and self.min_cosine >= gate.min_cosine
            and self.top_10_overlap >= gate.top_10_overlap
        )

    def __str__(self) -> str:
        return (
            f"cosine {self.mean_cosine:.4f} mean, {self.min_cosine:.4f} least; top-10 overlap {self.top_10_overlap:.3f}"
        )


class Measured(NamedTuple):
    """What a backend does on the sample."""

    agreement: Agreement
    texts_per_s: float


def load_encoder(directory: Path, backend: BackendName, device: "torch.device | str", cache: Path) -> Encoder:
    """The model of a sentence-transformers directory, computed by `backend`; ConfigError where that cannot be had."""
    runtime, arithmetic = backend.split("-")
    if runtime == "torch":
        import torch

        return Encoder.load(directory, device, getattr(torch, arithmetic))
    require_runtime(backend, device)
    home = exported_model(directory, runtime, arithmetic == "int8", cache)
    traits = Traits.model_validate_json((home / TRAITS_NAME).read_bytes())
    run: type[OpenVinoBackend] | type[OnnxBackend] = OpenVinoBackend if runtime == "openvino" else OnnxBackend
    return Encoder(
        Tokenizer.from_file(str(home / TOKENIZER_NAME)), traits, run(home, traits.pad_token_id, backend), device
    )


def exported_model(directory: Path, runtime: str, int8: bool, cache: Path) -> Path:
    """The directory of the exported model in the cache, exported now if it is not there."""
    stored = "int8" if int8 else "float"
    home = cache / "exported" / f"{runtime}-{stored}-{model_fingerprint(directory)[:16]}"
    if not home.exists():
        from embedlib.exporting import export_model  # brings in sentence-transformers

        export_model(directory, runtime, int8, home)
    return home


def torch_backend(arithmetic: str) -> BackendName:
    """PyTorch in this arithmetic."""
    return next(name for name in get_args(BackendName) if name == f"torch-{arithmetic}")


def require_runtime(backend: BackendName, device: "torch.device | str") -> None:
    """Raise ConfigError where the backend's packages are missing, or the device is none of its own."""
    runtime = backend.split("-")[0]
    if missing := [name for name in PACKAGES.get(runtime, ()) if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"backend: {backend} needs {missing}; install them with: pip install 'embedlib[{runtime}]'")
    if runtime in PACKAGES and device_type(device) != "cpu":
        raise ConfigError(f"backend: {backend} runs on CPUs; this is {device}. Use a torch backend.")


def available_backends(device: "torch.device | str") -> list[BackendName]:
    """The backends that this machine can try, the reference first."""
    if device_type(device) != "cpu":
        return ["torch-float32", "torch-bfloat16", "torch-float16"]
    found: list[BackendName] = []
    for name in get_args(BackendName):
        try:
            require_runtime(name, device)
        except ConfigError:
            continue
        if name != "torch-float16":  # slower than float32 on CPUs
            found.append(name)
    return found


def measure(encoder: Encoder, tokens: Sequence[TokenIds], reference: Vectors) -> Measured:
    """How near `encoder` is to the `reference` vectors (len(tokens), dim), and how fast."""
    vectors, seconds = encoder.encode_tokens(tokens), []
    for _ in range(RUNS):
        start = time.perf_counter()
        encoder.encode_tokens(tokens)
        seconds.append(time.perf_counter() - start)
    return Measured(Agreement.of(vectors, reference), len(tokens) / median(seconds))


def choose_backend(
    wanted: BackendName | Literal["auto"],
    reference: Encoder,
    texts: Sequence[str],
    gate: GateConfig,
    load: Callable[[BackendName], Encoder],
    available: Sequence[BackendName],
) -> tuple[BackendName, dict[BackendName, Measured]]:
    """The wanted backend, or for "auto" the fastest available one that passes, with what all were measured to do.

    Of those that are about as fast as the fastest, one that does without PyTorch.

    `reference` is the model in float32, `texts` (prompts included) are the sample. Raises ConfigError with the numbers
    where the wanted one does not pass.
    """
    tokens = reference.tokenise(texts)
    expected = reference.encode_tokens(tokens)
    measured = {
        name: measure(reference if name == REFERENCE else load(name), tokens, expected)
        for name in (available if wanted == "auto" else [wanted])
    }
    passing = {name: result for name, result in measured.items() if result.agreement.passes(gate)}
    if wanted != "auto" and wanted not in passing:
        raise ConfigError(
            f"backend: {wanted} is too far from {REFERENCE}: {measured[wanted].agreement}; expected {gate}"
        )
    enough = NEARLY * max(result.texts_per_s for result in passing.values())
    # What is exported starts in a fraction of the time, without PyTorch, and holds the model once.
    return max(
        (name for name, result in passing.items() if result.texts_per_s >= enough),
        key=lambda name: (not name.startswith("torch"), passing[name].texts_per_s),
    ), measured


class ExportedBackend(ABC):
    """A model in another runtime, which takes padded batches."""

    name: BackendName
    max_threads: int
    pads = True

    def pooled(self, batches: Sequence[Sequence[TokenIds]]) -> Vectors:
        """Vectors (sequences, embedding_dim) before normalisation, batch after batch."""
        return np.concatenate(in_threads(self._compute, batches, self.max_threads))

    @abstractmethod
    def _compute(self, sequences: Sequence[TokenIds]) -> Vectors: ...


class OpenVinoBackend(ExportedBackend):
    """An exported model in OpenVINO's CPU runtime, a stream a core; int8 quantises activations too, as they come."""

    def __init__(self, directory: Path, pad_id: int, name: BackendName) -> None:
        import openvino as ov

        self.name, self.pad_id = name, pad_id
        self.max_threads = cores()
        options: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": "f32" if name.endswith("float32") else "bf16",
            "INFERENCE_NUM_THREADS": self.max_threads,
            "NUM_STREAMS": self.max_threads,
        }
        if name.endswith("int8"):
            options["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = INT8_GROUP
        self.model = ov.Core().compile_model(directory / "model.xml", "CPU", options)
        self.of_thread = threading.local()
        # OpenVINO's binding sets itself up in a process' first call; two threads that both make it wait for ever.
        self._compute([np.zeros(2, np.int32)])

    def _compute(self, sequences: Sequence[TokenIds]) -> Vectors:
        if not hasattr(self.of_thread, "request"):
            self.of_thread.request = self.model.create_infer_request()
        # The request's next run writes where this one's vectors are.
        return np.array(self.of_thread.request.infer(list(padded(sequences, self.pad_id)))[0], np.float32)


class OnnxBackend(ExportedBackend):
    """An exported model in ONNX Runtime's CPU provider."""

    max_threads = 1

    def __init__(self, directory: Path, pad_id: int, name: BackendName) -> None:
        import onnxruntime

        self.name, self.pad_id = name, pad_id
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = cores()
        self.session = onnxruntime.InferenceSession(
            directory / "model.onnx", options, providers=["CPUExecutionProvider"]
        )

    def _compute(self, sequences: Sequence[TokenIds]) -> Vectors:
        names = ("input_ids", "attention_mask")
        inputs = dict(zip(names, padded(sequences, self.pad_id), strict=True))
        return np.asarray(self.session.run(None, inputs)[0], np.float32)
