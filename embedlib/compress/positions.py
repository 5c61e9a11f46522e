"""More positions than the teacher was trained with, for bodies that learned them one by one."""

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from embedlib.errors import ConfigError


def extend_positions(body: PreTrainedModel, max_length: int) -> None:
    """Let `body` read `max_length` tokens: positions past its end run through those that there were once more.

    Positions there were stay as they are, so that texts which fitted before have the same vectors; a body with enough
    of them is left alone. Those after them are the old ones stretched over what is added: neighbours stay neighbours,
    but a token past the old end shares about its position with an earlier one. This is a variant of our own. Of those
    in LongEmbed (Zhu et al. 2024, arXiv:2404.12096), recurrent positions are p mod L and jump back at each multiple of
    L, and interpolation keeps the order of all but would change the vectors of short texts. Raises ConfigError for a
    body too short that has no table of positions.
    """
    table = position_table(body, max_length)
    if table is None:
        return
    # RoBERTa's family counts from after the padding's id; rows up to it are no positions.
    first = 0 if table.padding_idx is None else table.padding_idx + 1
    old = table.weight.detach()[first:]
    added = max_length - len(old)
    if added <= 0:
        return
    stretched = functional.interpolate(old.T[None], size=added, mode="linear", align_corners=True)[0].T
    weights = torch.cat([table.weight.detach()[:first], old, stretched])
    embeddings = body.get_submodule("embeddings")
    extended = torch.nn.Embedding.from_pretrained(weights, freeze=False, padding_idx=table.padding_idx)
    embeddings.position_embeddings = extended
    for name in ("position_ids", "token_type_ids"):
        if hasattr(embeddings, name):
            like = getattr(embeddings, name)
            values = torch.arange(len(weights)) if name == "position_ids" else torch.zeros(len(weights))
            embeddings.register_buffer(name, values[None].to(like.dtype), persistent=False)
    body.config.max_position_embeddings = len(weights)


def position_table(body: PreTrainedModel, max_length: int) -> torch.nn.Embedding | None:
    """The table of positions (positions, hidden) of `body`; none where it reads `max_length` tokens without one.

    Raises ConfigError for a body too short that has no table of positions.
    """
    table = getattr(getattr(body, "embeddings", None), "position_embeddings", None)
    if isinstance(table, torch.nn.Embedding):
        return table
    if max_length <= getattr(body.config, "max_position_embeddings", 0):
        return None
    raise ConfigError(f"max_length: {max_length}; {type(body).__name__} has no table of positions to extend")
