"""Runtimes that compute a model in PyTorch's stead, each let in only where its vectors are near enough.

A backend is exported once, kept in a cache by the model's fingerprint, and measured against float32 on a sample of the
user's own texts before it is used: a quick runtime that ranks other neighbours is no gain.
"""

import importlib.util
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from pydantic import Field
from sentence_transformers import SentenceTransformer
from torch import nn

from embedlib.artifact import model_fingerprint, whole_directory
from embedlib.batching import TokenIds, pad
from embedlib.config import Config
from embedlib.encoder import Backend, Encoder, Vectors, load_model, sentence_vectors
from embedlib.errors import ConfigError
from embedlib.metrics import row_cosines, top_k_overlap

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


def load_encoder(directory: Path, backend: BackendName, device: torch.device, cache: Path) -> Encoder:
    """The model of a sentence-transformers directory, computed by `backend`; ConfigError where that cannot be had."""
    runtime, arithmetic = backend.split("-")
    if runtime == "torch":
        return Encoder.load(directory, device, getattr(torch, arithmetic))
    require_runtime(backend, device)
    model = load_model(directory, device)
    return Encoder(model, backend=build_backend(directory, model, backend, cache))


def torch_backend(dtype: torch.dtype) -> BackendName:
    """PyTorch in this arithmetic."""
    names: dict[torch.dtype, BackendName] = {
        torch.float32: "torch-float32",
        torch.bfloat16: "torch-bfloat16",
        torch.float16: "torch-float16",
    }
    return names[dtype]


def require_runtime(backend: BackendName, device: torch.device) -> None:
    """Raise ConfigError where the backend's packages are missing, or the device is none of its own."""
    runtime = backend.split("-")[0]
    if missing := [name for name in PACKAGES.get(runtime, ()) if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"backend: {backend} needs {missing}; install them with: pip install 'embedlib[{runtime}]'")
    if runtime in PACKAGES and device.type != "cpu":
        raise ConfigError(f"backend: {backend} runs on CPUs; this is {device.type}. Use a torch backend.")


def available_backends(device: torch.device) -> list[BackendName]:
    """The backends that this machine can try, the reference first."""
    if device.type != "cpu":
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
    return max(passing, key=lambda name: passing[name].texts_per_s), measured


def build_backend(directory: Path, model: SentenceTransformer, backend: BackendName, cache: Path) -> Backend:
    """The backend of an exported model, exported now if it is not in the cache."""
    runtime, arithmetic = backend.split("-")
    stored = "int8" if arithmetic == "int8" else "float"
    home = cache / "backends" / f"{runtime}-{stored}-{model_fingerprint(directory)[:16]}"
    export = export_openvino if runtime == "openvino" else export_onnx
    if not home.exists():
        with whole_directory(home) as scratch, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.export and torch.onnx warn of their own parts
            # A model of its own: that of an encoder may have been prepared for packed sequences.
            export(load_model(directory, torch.device("cpu")), scratch, arithmetic == "int8")
    run: type[OpenVinoBackend] | type[OnnxBackend] = OpenVinoBackend if runtime == "openvino" else OnnxBackend
    return run(home, int(model.tokenizer.pad_token_id), backend)


class PooledVectors(nn.Module):
    """A sentence-transformers model from padded ids to pooled vectors, as a graph to export."""

    def __init__(self, model: SentenceTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """`input_ids` and `attention_mask` (batch, seq) int64 to vectors (batch, embedding_dim) float32."""
        return sentence_vectors(self.model, {"input_ids": input_ids, "attention_mask": attention_mask})


def _example(model: SentenceTransformer) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.full((2, 8), int(model.tokenizer.pad_token_id))
    ids[0], ids[1, :5] = 5, 6
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return ids, mask


def exported(model: SentenceTransformer) -> torch.export.ExportedProgram:
    """The graph from padded ids to pooled vectors, for batches of any size and length."""
    batch, seq = torch.export.Dim("batch", min=1), torch.export.Dim("seq", min=2, max=model.max_seq_length)
    shapes = ({0: batch, 1: seq}, {0: batch, 1: seq})
    with torch.no_grad():
        return torch.export.export(
            PooledVectors(model.eval().requires_grad_(False)), _example(model), dynamic_shapes=shapes, strict=False
        )


def export_openvino(model: SentenceTransformer, directory: Path, int8: bool) -> None:
    """Write model.xml and model.bin; `int8` stores the linear layers' weights in eight bits."""
    import nncf
    import openvino as ov

    graph = ov.convert_model(exported(model))
    if int8:
        graph = nncf.compress_weights(graph, mode=nncf.CompressWeightsMode.INT8_SYM)
    ov.save_model(graph, directory / "model.xml", compress_to_fp16=False)


class OpenVinoBackend:
    """An exported model in OpenVINO's CPU runtime, a stream a core; int8 quantises activations too, as they come."""

    def __init__(self, directory: Path, pad_id: int, name: BackendName) -> None:
        import openvino as ov

        self.name, self.pad_id = name, pad_id
        self.max_threads = torch.get_num_threads()
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
        self([np.zeros(2, np.int32)])

    def __call__(self, sequences: Sequence[TokenIds]) -> torch.Tensor:
        """Pooled vectors (len(sequences), embedding_dim)."""
        if not hasattr(self.of_thread, "request"):
            self.of_thread.request = self.model.create_infer_request()
        features = pad(sequences, self.pad_id)
        inputs = [features["input_ids"].numpy(), features["attention_mask"].numpy()]
        # The request's next run writes where this one's vectors are.
        return torch.from_numpy(self.of_thread.request.infer(inputs)[0].copy())


def export_onnx(model: SentenceTransformer, directory: Path, int8: bool) -> None:
    """Write model.onnx; `int8` stores the linear layers' weights in eight bits, a scale a column."""
    path = directory / ("float.onnx" if int8 else "model.onnx")
    torch.onnx.export(
        exported(model), (), path, input_names=["input_ids", "attention_mask"], output_names=["vectors"], verbose=False
    )
    if int8:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantize_dynamic(path, directory / "model.onnx", per_channel=True, weight_type=QuantType.QInt8)
        for left in directory.glob("float.onnx*"):
            left.unlink()


class OnnxBackend:
    """An exported model in ONNX Runtime's CPU provider."""

    max_threads = 1

    def __init__(self, directory: Path, pad_id: int, name: BackendName) -> None:
        import onnxruntime

        self.name, self.pad_id = name, pad_id
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(
            directory / "model.onnx", options, providers=["CPUExecutionProvider"]
        )

    def __call__(self, sequences: Sequence[TokenIds]) -> torch.Tensor:
        """Pooled vectors (len(sequences), embedding_dim)."""
        features = pad(sequences, self.pad_id)
        vectors = self.session.run(None, {name: features[name].numpy() for name in ("input_ids", "attention_mask")})[0]
        return torch.from_numpy(vectors)
