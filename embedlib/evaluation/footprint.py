"""What a model is and what it costs to run: size, memory, throughput, latency, measured in a process of its own."""

import resource
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from embedlib.artifact import model_fingerprint
from embedlib.config import Config
from embedlib.encoder import Encoder
from embedlib.evaluation.comparison import describe_model, symmetric_prompt, weight_megabytes

SINGLE_TEXTS = 30


class Footprint(Config):
    """What a model is and what it costs to run here."""

    fingerprint: str
    """What decides its vectors."""
    params: int
    """Parameters, embeddings included."""
    layers: int
    """Transformer layers."""
    vocabulary: int
    """Rows of the word embedding."""
    embedding_dim: int
    """Elements of a vector."""
    max_tokens: int
    """Tokens it reads of a text."""
    megabytes: float
    """Weights on disk, in 10^6 bytes."""
    texts_per_s: float
    """Texts a second, many at once; the median of several runs."""
    latency_ms: float
    """Milliseconds for one text alone; the median."""
    memory_mb: float
    """Peak of resident memory of the process that measured it, in 10^6 bytes, libraries included."""
    arithmetic: str
    """What computed."""
    cost_per_million: float | None = None
    """Cost of a million such texts, in the currency of the price that was given."""


def measure_footprint(encoder: Encoder, directory: Path, texts: Sequence[str]) -> Footprint:
    """Measure the model of `directory` on `texts`, in the arithmetic of `encoder`, once."""
    prompt = symmetric_prompt(encoder.prompts)
    encoder.encode(texts[:SINGLE_TEXTS], prompt)
    return Footprint(
        **describe_model(encoder, directory.name).model_dump(exclude={"name"}),
        fingerprint=model_fingerprint(directory),
        max_tokens=encoder.max_seq_length,
        megabytes=weight_megabytes(directory),
        texts_per_s=len(texts) / _seconds(encoder, texts, prompt),
        latency_ms=1000 * median(_seconds(encoder, [text], prompt) for text in texts[:SINGLE_TEXTS]),
        memory_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
        arithmetic=encoder.backend.name,
    )


def middle_of(runs: Sequence[Footprint], price_per_hour: float | None = None) -> Footprint:
    """One footprint of a model's runs: the medians of what varies, and the cost by the machine's price."""
    varying = ("texts_per_s", "latency_ms", "memory_mb")
    middle = {name: median(getattr(run, name) for run in runs) for name in varying}
    cost = price_per_hour / 3600 / middle["texts_per_s"] * 1e6 if price_per_hour else None
    return runs[0].model_copy(update=middle | {"cost_per_million": cost})


def _seconds(encoder: Encoder, texts: Sequence[str], prompt: str | None) -> float:
    start = time.perf_counter()
    encoder.encode(texts, prompt)
    return time.perf_counter() - start
