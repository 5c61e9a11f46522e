"""How far the compressed model has drifted from the full one on what users really send."""

from collections import deque
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field
from scipy.stats import spearmanr

from embedlib.config import Config
from serve.metrics import GatewayMetrics

# Texts whose similarities are compared, and the fewest for a correlation that says something.
LATEST, FEWEST = 64, 8


class DriftConfig(Config):
    """Which traffic is computed a second time, by another model."""

    model: str = "compressed"
    """The model whose answers are checked."""
    reference: str = "full"
    """The model they are held against."""
    share: float = Field(default=0.01, ge=0, le=1)
    """Of the requests, one text each."""


class Drift:
    """Compares the two models' vectors of sampled texts; of the texts nothing is kept."""

    def __init__(self, metrics: GatewayMetrics) -> None:
        self.metrics = metrics
        self.latest: deque[tuple[npt.NDArray[Any], npt.NDArray[Any]]] = deque(maxlen=LATEST)

    def add(self, vector: npt.NDArray[Any], reference: npt.NDArray[Any]) -> None:
        """Count a text's two unit vectors, whose dimensions may differ."""
        if len(vector) == len(reference):
            self.metrics.drift_cosine.observe(float(vector @ reference))
        self.latest.append((vector, reference))
        if len(self.latest) >= FEWEST:
            ours, theirs = (np.stack(vectors) for vectors in zip(*self.latest, strict=True))
            pairs = np.triu_indices(len(ours), k=1)
            correlation = spearmanr((ours @ ours.T)[pairs], (theirs @ theirs.T)[pairs]).statistic
            self.metrics.drift_spearman.set(float(np.nan_to_num(correlation)))
