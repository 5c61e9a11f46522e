"""Encoder: tokenise → token-budget batches → forward → pool → normalise."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize
from tokenizers import Tokenizer
from torch import nn
from transformers import PreTrainedModel

from embedlib.artifact import require_model
from embedlib.batching import TokenIds, token_budget_batches
from embedlib.errors import ConfigError
from embedlib.memory import keep_freed_memory
from embedlib.packing import Features, collator
from embedlib.threads import side_by_side

# Texts whose lengths are sorted together: enough to fill batches of one length, few enough to stream.
WINDOW = 8192
# Tokens a forward. On CPUs larger batches fall out of the caches; on GPUs smaller ones leave it idle.
CPU_BATCH_TOKENS = 1536
CUDA_BATCH_TOKENS = 65536
# Fewer tokens than that are not worth a thread of their own.
LEAST_BATCH_TOKENS = 256
# Python has one interpreter lock: beyond so many threads they would rather wait for it than compute.
MAX_THREADS = 8

Vectors = npt.NDArray[np.float32]


class Backend(Protocol):
    """What multiplies: the forward of a model in some runtime and arithmetic."""

    @property
    def name(self) -> str:
        """Runtime and arithmetic, as in `torch-bfloat16`."""
        ...

    @property
    def max_threads(self) -> int:
        """How many calls at once are worth making."""
        ...

    def __call__(self, sequences: Sequence[TokenIds]) -> torch.Tensor:
        """Pooled vectors (len(sequences), embedding_dim) before normalisation, of sequences sorted by length."""
        ...


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it faster than float32, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    capabilities = torch.cpu.get_capabilities()
    return torch.bfloat16 if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else torch.float32


def default_device() -> torch.device:
    """The CUDA device where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def body_of(model: SentenceTransformer) -> PreTrainedModel:
    """The transformer body inside a sentence-transformers model."""
    body = next(iter(model.children())).model
    assert isinstance(body, PreTrainedModel)  # noqa: S101 (narrows the type)
    return body


def with_prompts(texts: Sequence[str], prefixes: Sequence[str], first: int = 0) -> list[str]:
    """Each text with one of the prefixes before it, in turn; `first` is the number of the first text."""
    return (
        [prefixes[number % len(prefixes)] + text for number, text in enumerate(texts, first)]
        if prefixes
        else list(texts)
    )


def sentence_vectors(model: SentenceTransformer, features: Features) -> torch.Tensor:
    """Pooled vectors (batch, embedding_dim) before normalisation, which is where distillation compares them."""
    for module in model.children():
        if not isinstance(module, Normalize):
            features = module(features)
    vectors: torch.Tensor = features["sentence_embedding"]
    return vectors


class SentenceVectors(nn.Module):
    """A sentence-transformers model as a module from token ids to pooled vectors before normalisation, for training."""

    def __init__(self, model: SentenceTransformer) -> None:
        super().__init__()
        self.model = model
        self.collate = collator(model)

    def forward(self, **features: Any) -> torch.Tensor:
        """What `collate` makes of token sequences to vectors (batch, embedding_dim)."""
        return sentence_vectors(self.model, features)


class TorchBackend:
    """The model as it is, in PyTorch, on packed sequences where its architecture allows that."""

    def __init__(self, model: SentenceTransformer, dtype: torch.dtype) -> None:
        self.model = model.eval().to(dtype)
        self.collate = collator(model)
        self.name = f"torch-{str(dtype).removeprefix('torch.')}"
        self.max_threads = MAX_THREADS if model.device.type == "cpu" else 1

    @torch.inference_mode()
    def __call__(self, sequences: Sequence[TokenIds]) -> torch.Tensor:
        """Pooled vectors (len(sequences), embedding_dim) before normalisation."""
        return sentence_vectors(self.model, self.collate(sequences))


class Encoder:
    """A sentence-transformers model that encodes many texts with little padding, on one device."""

    def __init__(
        self, model: SentenceTransformer, dtype: torch.dtype = torch.float32, backend: Backend | None = None
    ) -> None:
        """`backend` computes in the model's stead, which then gives tokenizer, prompts and head alone."""
        self.model = model
        self.device = model.device
        if self.device.type == "cpu":
            keep_freed_memory()
        self.backend = backend or TorchBackend(model, dtype)
        self.max_seq_length = int(model.max_seq_length or 512)
        self.embedding_dim = int(model.get_embedding_dimension() or 0)
        self.normalises = any(isinstance(module, Normalize) for module in model.children())
        self.batch_tokens = CUDA_BATCH_TOKENS if self.device.type == "cuda" else CPU_BATCH_TOKENS
        if not hasattr(model.tokenizer, "backend_tokenizer"):
            raise ConfigError(f"model: its tokenizer is a {type(model.tokenizer).__name__}; expected a fast tokenizer")
        # A copy: truncation is a state of the tokenizer, and the model keeps its own.
        self.tokenizer = Tokenizer.from_str(model.tokenizer.backend_tokenizer.to_str())
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = bool(model.tokenizer.split_special_tokens)
        self.tokenizer.enable_truncation(self.max_seq_length)

    @classmethod
    def load(cls, directory: Path, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Self:
        """Load a sentence-transformers directory of safetensors weights; `dtype` defaults to the fast one."""
        device = device or default_device()
        return cls(load_model(directory, device), dtype or fast_dtype(device))

    @property
    def body(self) -> PreTrainedModel:
        """The transformer body."""
        return body_of(self.model)

    @property
    def num_parameters(self) -> int:
        """Number of weights of the body."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @cached_property
    def whole_texts(self) -> Tokenizer:
        """The tokenizer that cuts nothing; a large one takes memory, so it is made where long texts are looked at."""
        tokenizer = Tokenizer.from_str(self.tokenizer.to_str())
        tokenizer.no_truncation()
        return tokenizer

    def prompt(self, name: str | None) -> str:
        """The prefix called `name`; ConfigError where the model has no such prompt."""
        if name is None:
            return ""
        prompts = self.model.prompts
        if name not in prompts:
            raise ConfigError(f"prompt {name!r}: this model has {sorted(prompts)}")
        return str(prompts[name])

    def tokenise(self, texts: Sequence[str], prompt_name: str | None = None) -> list[TokenIds]:
        """Token ids of each text with the prompt before it, cut at the model's length."""
        prefix = self.prompt(prompt_name)
        encodings = self.tokenizer.encode_batch_fast([prefix + text for text in texts])
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def encode(self, texts: Sequence[str], prompt_name: str | None = None) -> Vectors:
        """Vectors (len(texts), embedding_dim) float32 in the order of the texts, as `SentenceTransformer.encode` gives.

        Equal texts are computed once.
        """
        unique = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        vectors = np.empty((len(unique), self.embedding_dim), dtype=np.float32)
        start = 0
        for tokens in self._tokenised_windows(list(unique), prompt_name):
            vectors[start : start + len(tokens)] = self.encode_tokens(tokens)
            start += len(tokens)
        return vectors if len(unique) == len(texts) else vectors[[unique[text] for text in texts]]

    def _tokenised_windows(self, texts: Sequence[str], prompt_name: str | None) -> Iterator[list[TokenIds]]:
        windows = [texts[start : start + WINDOW] for start in range(0, len(texts), WINDOW)]
        if self.device.type == "cpu":
            # Nothing would overlap: both want the same cores.
            yield from (self.tokenise(window, prompt_name) for window in windows)
            return
        with ThreadPoolExecutor(max_workers=1) as ahead:
            following = ahead.submit(self.tokenise, windows[0] if windows else [], prompt_name)
            for window in [*windows[1:], []]:
                tokens, following = following.result(), ahead.submit(self.tokenise, window, prompt_name)
                yield tokens

    def encode_tokens(self, tokens: Sequence[TokenIds], normalise: bool | None = None) -> Vectors:
        """Vectors (len(tokens), embedding_dim) float32 of token sequences that hold their prompt already.

        `normalise=False` gives them as pooled, before normalisation, True as unit vectors, None as the model does.
        """
        normalise = self.normalises if normalise is None else normalise
        vectors = torch.empty((len(tokens), self.embedding_dim), pin_memory=self.device.type == "cuda")
        lengths = np.array([len(sequence) for sequence in tokens])
        share = int(lengths.sum()) // min(self.backend.max_threads, torch.get_num_threads())
        budget = min(self.batch_tokens, max(LEAST_BATCH_TOKENS, share))
        batches = list(token_budget_batches(lengths, budget))
        starts = np.cumsum([0, *map(len, batches)])

        def compute(number: int) -> None:
            pooled = self.backend([tokens[row] for row in batches[number]]).float()
            # Not awaited on a GPU: the next batch is put together while this one is computed and copied.
            vectors[starts[number] : starts[number + 1]].copy_(
                nn.functional.normalize(pooled, dim=-1) if normalise else pooled, non_blocking=True
            )

        side_by_side(compute, range(len(batches)), self.backend.max_threads)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        in_batches = np.concatenate([*batches, np.empty(0, np.int64)])
        return np.asarray(vectors.numpy()[np.argsort(in_batches)])


def load_model(directory: Path, device: torch.device) -> SentenceTransformer:
    """The model of a sentence-transformers directory of safetensors weights; no code of the directory is run."""
    require_model(directory)
    return SentenceTransformer(str(directory), device=str(device), trust_remote_code=False, local_files_only=True)
