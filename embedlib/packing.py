"""Sequences laid end to end instead of padded: the linear layers, nearly all of the arithmetic, never see padding.

sentence-transformers pools such packed input by its `cu_seq_lens_q`, the running sum of the lengths; what is added here
is the attention, on any device, and the position ids, which in packed input have to be given.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import groupby
from typing import Any, Literal, NamedTuple, get_args

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

# Runs of equally long sequences are attended to at once. Shorter runs are joined, with padding, to be worth the calls.
WORTHWHILE_RUN = 16
LEAST_FILL = 0.75

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
        "attention_groups": AttentionGroups(lengths.tolist(), device),
    }


class AttentionGroup(NamedTuple):
    """Neighbouring sequences of like length that are attended to at once."""

    num_tokens: int
    num_sequences: int
    longest: int
    unpack: torch.Tensor | None = None
    """Which token stands at each place when they are padded, (num_sequences * longest,); none: equally long."""
    repack: torch.Tensor | None = None
    """The place of each token, (num_tokens,)."""
    mask: torch.Tensor | None = None
    """Whether a place holds a token, (num_sequences, 1, 1, longest)."""


class AttentionGroups:
    """The groups of a batch, made when they are first asked for: GPUs attend to packed sequences without them."""

    def __init__(self, lengths: list[int], device: torch.device | str) -> None:
        self.lengths, self.device = lengths, device

    @cached_property
    def in_order(self) -> list[AttentionGroup]:
        """The groups, as their sequences lie."""
        return [attention_group(group, self.device) for group in grouped_lengths(self.lengths)]


def grouped_lengths(lengths: Sequence[int]) -> list[list[int]]:
    """Neighbouring lengths in groups: long runs of one length alone, short ones joined while little is padding."""
    groups: list[list[int]] = []
    for length, run in ((length, list(run)) for length, run in groupby(lengths)):
        if groups and len(groups[-1]) < WORTHWHILE_RUN and LEAST_FILL * groups[-1][0] <= length <= groups[-1][0]:
            groups[-1] += run
        else:
            groups.append(run)
    return groups


def attention_group(lengths: list[int], device: torch.device | str) -> AttentionGroup:
    """The group of sequences of these lengths, longest first."""
    sizes = np.array(lengths)
    longest = lengths[0]
    if lengths[-1] == longest:
        return AttentionGroup(int(sizes.sum()), len(sizes), longest)
    held = np.arange(longest) < sizes[:, None]
    unpack = np.zeros(held.size, dtype=np.int64)
    places = np.flatnonzero(held)
    unpack[places] = np.arange(len(places))
    indices = (torch.from_numpy(array).to(device) for array in (unpack, places, held[:, None, None]))
    return AttentionGroup(len(places), len(sizes), longest, *indices)


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
    groups: list[AttentionGroup] = kwargs["attention_groups"].in_order
    num_tokens = [group.num_tokens for group in groups]
    tokens_first = (tensor[0].transpose(0, 1).split(num_tokens) for tensor in (query, key, value))
    outputs = []
    for group, *parts in zip(groups, *tokens_first, strict=True):
        q, k, v = (_unpacked(part, group) for part in parts)
        output = attend(q, k, v, group.mask, scaling, dropout).transpose(1, 2).flatten(0, 1)
        outputs.append(output if group.repack is None else output.index_select(0, group.repack))
    return torch.cat(outputs)[None], None


def _unpacked(tokens: torch.Tensor, group: AttentionGroup) -> torch.Tensor:
    """(tokens, heads, head_dim) to (sequences, heads, longest, head_dim): a view, where they are equally long."""
    places = tokens if group.unpack is None else tokens.index_select(0, group.unpack)
    padded: torch.Tensor = places.unflatten(0, (group.num_sequences, group.longest))
    return padded.transpose(1, 2)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    dropout: float,
) -> torch.Tensor:
    """Attention over (batch, heads, seq, head_dim) to the places that a (batch, 1, 1, seq) mask holds, or to all."""
    if query.requires_grad and query.device.type == "cpu":
        # PyTorch's fused attention is slow backwards on CPUs.
        scores = (query * (scaling if scaling is not None else query.shape[-1] ** -0.5)) @ key.transpose(-1, -2)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        weights: torch.Tensor = nn.functional.dropout(scores.softmax(dim=-1), dropout, dropout > 0)
        return weights @ value
    return nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scaling, dropout_p=dropout
    )
