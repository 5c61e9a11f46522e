"""A cross-encoder: a model that reads a query and a passage together and says how well they match."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch
    from sentence_transformers import CrossEncoder

BATCH_PAIRS = 32


def is_cross_encoder(directory: Path) -> bool:
    """Whether a model directory holds one: a transformer with a head that classifies sequences."""
    path = directory / "config.json"
    architectures = json.loads(path.read_text()).get("architectures") if path.is_file() else None
    return any(name.endswith("ForSequenceClassification") for name in architectures or [])


class PairScorer:
    """A cross-encoder that scores many pairs."""

    def __init__(self, model: "CrossEncoder") -> None:
        self.model = model

    @classmethod
    def load(cls, directory: Path, device: "torch.device") -> Self:
        """Load a directory of safetensors weights; no code of the directory is run."""
        from sentence_transformers import CrossEncoder

        return cls(CrossEncoder(str(directory), device=str(device), trust_remote_code=False, local_files_only=True))

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> npt.NDArray[np.float32]:
        """The score of each query and passage, (pairs,)."""
        if not pairs:
            return np.empty(0, np.float32)
        scores = self.model.predict(list(pairs), batch_size=BATCH_PAIRS, show_progress_bar=False)
        return np.asarray(scores, np.float32)
