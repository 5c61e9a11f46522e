"""A sentence-transformers model in PyTorch: loading it, its forward, and as a backend of an encoder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize
from tokenizers import Tokenizer
from torch import nn
from transformers import PreTrainedModel

from embedlib.artifact import require_model
from embedlib.batching import TokenIds
from embedlib.errors import ConfigError
from embedlib.packing import Features, collator, packed_architecture
from embedlib.threads import MAX_THREADS, side_by_side
from embedlib.traits import Traits


def load_model(directory: Path, device: torch.device | str) -> SentenceTransformer:
    """The model of a sentence-transformers directory of safetensors weights; no code of the directory is run."""
    require_model(directory)
    return SentenceTransformer(str(directory), device=str(device), trust_remote_code=False, local_files_only=True)


def body_of(model: SentenceTransformer) -> PreTrainedModel:
    """The transformer body inside a sentence-transformers model."""
    body = next(iter(model.children())).model
    assert isinstance(body, PreTrainedModel)  # noqa: S101 (narrows the type)
    return body


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

    def __init__(self, model: SentenceTransformer, dtype: torch.dtype | None) -> None:
        dtype = dtype or torch.float32
        self.model = model.eval().to(dtype)
        self.collate = collator(model)
        self.pads = packed_architecture(model) is None
        self.name = f"torch-{str(dtype).removeprefix('torch.')}"
        self.max_threads = MAX_THREADS if model.device.type == "cpu" else 1

    def pooled(self, batches: Sequence[Sequence[TokenIds]]) -> npt.NDArray[np.float32]:
        """Vectors (sequences, embedding_dim) before normalisation, batch after batch."""
        on_gpu = self.model.device.type == "cuda"
        starts = np.cumsum([0, *map(len, batches)]).tolist()
        vectors = torch.empty((starts[-1], int(self.model.get_embedding_dimension() or 0)), pin_memory=on_gpu)

        def compute(number: int) -> None:
            # Not awaited on a GPU: the next batch is put together while this one is computed and copied.
            found = self(batches[number]).float()
            vectors[starts[number] : starts[number + 1]].copy_(found, non_blocking=True)

        side_by_side(compute, range(len(batches)), self.max_threads)
        if on_gpu:
            torch.cuda.synchronize(self.model.device)
        return np.asarray(vectors.numpy())

    @torch.inference_mode()
    def __call__(self, sequences: Sequence[TokenIds]) -> torch.Tensor:
        """Pooled vectors (len(sequences), embedding_dim) before normalisation."""
        return sentence_vectors(self.model, self.collate(sequences))


def tokenizer_of(model: SentenceTransformer) -> Tokenizer:
    """The model's own tokenizer, since one of 250,000 pieces takes 300 MB; ConfigError where it is a slow one."""
    if not hasattr(model.tokenizer, "backend_tokenizer"):
        raise ConfigError(f"model: its tokenizer is a {type(model.tokenizer).__name__}; expected a fast tokenizer")
    tokenizer: Tokenizer = model.tokenizer.backend_tokenizer
    return tokenizer


def traits_of(model: SentenceTransformer) -> Traits:
    """What an encoder has to know of the model."""
    return Traits(
        embedding_dim=int(model.get_embedding_dimension() or 0),
        max_seq_length=int(model.max_seq_length or 512),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        normalises=any(isinstance(module, Normalize) for module in model.children()),
        prompts=dict(model.prompts),
        pad_token_id=int(model.tokenizer.pad_token_id),
        unknown_token_id=model.tokenizer.unk_token_id,
        splits_special_tokens=bool(model.tokenizer.split_special_tokens),
    )
