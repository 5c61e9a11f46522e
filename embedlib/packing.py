"""Sequences laid end to end instead of padded: the linear layers, nearly all of the arithmetic, never see padding.

sentence-transformers pools such packed input by its `cu_seq_lens_q`, the running sum of the lengths; what is added here
is the attention, on any device, and the position ids, which in packed input have to be given.
"""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, Literal, get_args

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from embedlib.batching import TokenIds, pad

PACKED_ATTENTION = "embedlib_packed"
# Bodies with learned absolute positions, whose attention knows no other.
Architecture = Literal["bert", "roberta", "xlm-roberta", "camembert"]

Features = dict[str, Any]
Collate = Callable[[Sequence[TokenIds]], Features]
"""Token sequences to what a sentence-transformers model is given; longest first is quickest."""


def collator(model: SentenceTransformer) -> Collate:
    """How to put token sequences before `model`: packed where its architecture is known to allow that, else padded.

    A model that takes packed sequences takes padded ones as before.
    """
    pad_id = int(model.tokenizer.pad_token_id)
    architecture = packed_architecture(model)
    if architecture is None:
        return lambda sequences: pad(sequences, pad_id, model.device)
    AttentionInterface.register(PACKED_ATTENTION, packed_attention)
    AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)
    body: Any = next(iter(model.children())).model
    body.set_attn_implementation(PACKED_ATTENTION)
    padding = None if architecture == "bert" else int(body.config.pad_token_id)
    return lambda sequences: pack(sequences, padding, model.device)


def packed_architecture(model: SentenceTransformer) -> Architecture | None:
    """The body's architecture; None where packing would change the vectors, or might."""
    modules: list[Any] = list(model.children())
    known = all(isinstance(module, Transformer | Pooling | Dense | Normalize) for module in modules)
    whole = all(module.include_prompt for module in modules if isinstance(module, Pooling))
    if not (known and whole and isinstance(modules[0], Transformer)):
        return None
    config = modules[0].model.config
    return config.model_type if config.model_type in get_args(Architecture) and not config.is_decoder else None


def pack(sequences: Sequence[TokenIds], padding: int | None = None, device: torch.device | str = "cpu") -> Features:
    """`input_ids` and `position_ids`, both (1, tokens) int64, and where each sequence ends.

    `padding` is the padding's id in RoBERTa's family, whose positions follow it and which passes over a padding token
    in the midst of a text; None counts positions from zero.
    """
    ids = np.concatenate(sequences).astype(np.int64)
    lengths = np.array([len(sequence) for sequence in sequences])
    ends = np.cumsum(lengths)
    counted = np.ones_like(ids) if padding is None else (ids != padding).astype(np.int64)
    before = np.concatenate([[0], np.cumsum(counted)])
    positions = before[1:] - np.repeat(before[ends - lengths], lengths)
    positions = positions - 1 if padding is None else positions * counted + padding
    cumulative = torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)).to(device, non_blocking=True)
    longest = int(lengths.max())
    return {
        "input_ids": torch.from_numpy(ids)[None].to(device, non_blocking=True),
        "position_ids": torch.from_numpy(positions)[None].to(device, non_blocking=True),
        "cu_seq_lens_q": cumulative,
        "cu_seq_lens_k": cumulative,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of each sequence to itself; query, key and value (1, heads, tokens, head_dim), packed.

    Without `cu_seq_lens_q` they are (batch, heads, seq, head_dim), padded, and the mask says so. Returns
    (batch, tokens, heads, head_dim).
    """
    cumulative: torch.Tensor | None = kwargs.get("cu_seq_lens_q")
    if cumulative is None:
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, is_causal=False
        )
        return output, None
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and dropout == 0:
        q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        longest = kwargs["max_length_q"]
        packed = varlen_attn(q, k, v, cumulative, cumulative, longest, longest, scale=scaling)
        assert isinstance(packed, torch.Tensor)  # noqa: S101 (narrows the type)
        return packed[None], None
    runs = equal_length_runs(cumulative)
    num_tokens = [count * length for count, length in runs]
    outputs = []
    for (_, length), *parts in zip(
        runs, *(tensor[0].split(num_tokens, 1) for tensor in (query, key, value)), strict=True
    ):
        # (sequences, heads, length, head_dim): a view, since sequences of one length lie side by side.
        q, k, v = (part.unflatten(1, (-1, length)).transpose(0, 1) for part in parts)
        outputs.append(attend(q, k, v, scaling, dropout).transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)[None], None


def equal_length_runs(cumulative: torch.Tensor) -> list[tuple[int, int]]:
    """How many neighbouring sequences are equally long, and how long."""
    return [(len(list(run)), length) for length, run in groupby(cumulative.diff().tolist())]


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, dropout: float
) -> torch.Tensor:
    """Attention over (batch, heads, seq, head_dim) without a mask."""
    if query.requires_grad and query.device.type == "cpu":
        # PyTorch's fused attention is slow backwards on CPUs.
        scaled = query * (scaling if scaling is not None else query.shape[-1] ** -0.5)
        weights = nn.functional.softmax(scaled @ key.transpose(-1, -2), dim=-1)
        return nn.functional.dropout(weights, dropout, dropout > 0) @ value
    return nn.functional.scaled_dot_product_attention(query, key, value, scale=scaling, dropout_p=dropout)
