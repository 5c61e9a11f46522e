"""Encoder: tokenise → token-budget batches → forward → pool → normalise."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

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

# Texts whose lengths are sorted together: enough to fill batches of one length, few enough to stream.
WINDOW = 8192
# Tokens a forward. On CPUs larger batches fall out of the caches; on GPUs smaller ones leave it idle.
CPU_BATCH_TOKENS = 4096
CUDA_BATCH_TOKENS = 65536


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


class Encoder:
    """A sentence-transformers model that encodes many texts with little padding, on one device."""

    def __init__(self, model: SentenceTransformer, dtype: torch.dtype = torch.float32) -> None:
        self.model = model.eval().to(dtype)
        self.device = model.device
        if self.device.type == "cpu":
            keep_freed_memory()
        self.max_seq_length = int(model.max_seq_length or 512)
        self.embedding_dim = int(model.get_embedding_dimension() or 0)
        self.batch_tokens = CUDA_BATCH_TOKENS if self.device.type == "cuda" else CPU_BATCH_TOKENS
        self.collate = collator(model)
        # A copy: truncation is a state of the tokenizer, and the model keeps its own.
        self.tokenizer = Tokenizer.from_str(model.tokenizer.backend_tokenizer.to_str())
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = bool(model.tokenizer.split_special_tokens)
        self.tokenizer.enable_truncation(self.max_seq_length)

    @classmethod
    def load(cls, directory: Path, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Self:
        """Load a sentence-transformers directory of safetensors weights; `dtype` defaults to the fast one."""
        require_model(directory)
        device = device or default_device()
        model = SentenceTransformer(str(directory), device=str(device), trust_remote_code=False, local_files_only=True)
        return cls(model, dtype or fast_dtype(device))

    @property
    def body(self) -> PreTrainedModel:
        """The transformer body."""
        return body_of(self.model)

    @property
    def num_parameters(self) -> int:
        """Number of weights of the body."""
        return sum(parameter.numel() for parameter in self.model.parameters())

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

    def encode(self, texts: Sequence[str], prompt_name: str | None = None) -> npt.NDArray[np.float32]:
        """Unit vectors (len(texts), embedding_dim) float32, in the order of the texts."""
        vectors = np.empty((len(texts), self.embedding_dim), dtype=np.float32)
        for start in range(0, len(texts), WINDOW):
            tokens = self.tokenise(texts[start : start + WINDOW], prompt_name)
            vectors[start : start + WINDOW] = self.encode_tokens(tokens)
        return vectors

    @torch.inference_mode()
    def encode_tokens(self, tokens: Sequence[TokenIds], normalise: bool = True) -> npt.NDArray[np.float32]:
        """Vectors (len(tokens), embedding_dim) float32 of token sequences that hold their prompt already.

        `normalise=False` gives them as pooled, before normalisation.
        """
        vectors = np.empty((len(tokens), self.embedding_dim), dtype=np.float32)
        lengths = np.array([len(sequence) for sequence in tokens])
        for rows in token_budget_batches(lengths, self.batch_tokens):
            pooled = sentence_vectors(self.model, self.collate([tokens[row] for row in rows])).float()
            vectors[rows] = (nn.functional.normalize(pooled, dim=-1) if normalise else pooled).cpu().numpy()
        return vectors
