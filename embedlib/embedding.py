"""From texts to vectors in the form that is asked for: prompts, long texts, backend, dimensions and number type."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field

from embedlib.backends import (
    REFERENCE,
    BackendName,
    GateConfig,
    Measured,
    available_backends,
    choose_backend,
    load_encoder,
    torch_backend,
)
from embedlib.chunking import pool_chunks, split_long
from embedlib.config import Config
from embedlib.encoder import Encoder, fast_arithmetic, lengths_of, with_prompts
from embedlib.errors import ConfigError
from embedlib.model_directory import trained_dimensions
from embedlib.quantization import NEEDS_RANGES, OutputDtype, calibrate, quantise, truncate

if TYPE_CHECKING:
    import torch

GATE_TEXTS = 512


class VectorsConfig(Config):
    """The form of the vectors."""

    dtype: OutputDtype = "float16"
    """float32, float16, int8 and uint8 (calibrated on the corpus), binary and ubinary (eight signs a byte)."""
    dimensions: int | None = Field(default=None, ge=1)
    """Only so many first dimensions, as unit vectors; refused for a model that was not trained for it."""
    force_dimensions: bool = False
    """Cut the vectors of a model that was not trained for it all the same."""
    normalise: bool | None = None
    """Unit vectors, or as pooled, which is what distillation learns from; none: as the model does."""


class EmbeddingConfig(Config):
    """How texts become vectors."""

    prompts: list[str] = Field(default=[], max_length=8)
    """Names of prompts to put before the texts; with several, row number n gets prompt n modulo their number."""
    backend: BackendName | Literal["auto"] | None = None
    """What computes; auto: the fastest that passes the gate, or one without PyTorch that is nearly as fast;
    none: PyTorch in the hardware's fast arithmetic."""
    gate: GateConfig = GateConfig()
    """How near to float32 a backend that was named, or found by auto, must be on a sample of the texts."""
    vectors: VectorsConfig = VectorsConfig()
    """The form of the vectors."""
    long_texts: Literal["truncate", "mean", "max"] = "truncate"
    """Texts longer than the model reads: cut, or embedded in chunks whose vectors are pooled."""
    chunk_overlap: int = Field(default=32, ge=0)
    """Tokens that neighbouring chunks share."""

    @property
    def needs_sample(self) -> bool:
        """Whether texts have to be embedded before it is settled how to embed."""
        return self.backend not in (None, REFERENCE) or self.vectors.dtype in NEEDS_RANGES


class Prepared(Config):
    """What has to be the same for all texts of a run, settled before the first."""

    backend: BackendName
    """What computes."""
    measured: dict[str, dict[str, float]] = Field(default_factory=dict)
    """What each backend that was tried was measured to do."""
    ranges: list[list[float]] | None = None
    """Calibration of int8 and uint8: the lowest and the highest value of each dimension."""


class Computed(NamedTuple):
    """What the model was given."""

    texts: int
    """Distinct ones, of which equal texts are one."""
    tokens: int
    """Their tokens."""
    padded_tokens: int
    """The same with the padding of their batches."""


class Embedded(NamedTuple):
    """Texts as vectors."""

    vectors: npt.NDArray[Any]
    """(texts, dim) in the number type asked for."""
    num_tokens: npt.NDArray[np.int64]
    """Tokens that each text cost, its prompt included; equal texts are computed once and count each."""
    finite: npt.NDArray[np.bool_]
    """Whether the model gave the text a vector at all."""
    computed: Computed
    """What that took."""


class TextEmbedder:
    """Embeds texts in one process."""

    def __init__(self, encoder: Encoder, config: EmbeddingConfig, ranges: npt.NDArray[np.float32] | None) -> None:
        self.encoder, self.config, self.ranges = encoder, config, ranges
        self.prefixes = [encoder.prompt(name) for name in config.prompts]

    @classmethod
    def load(
        cls, directory: Path, config: EmbeddingConfig, prepared: Prepared, device: "torch.device | str", cache: Path
    ) -> Self:
        """The embedder that `prepare` settled on."""
        return cls.of(load_encoder(directory, prepared.backend, device, cache), config, prepared)

    @classmethod
    def of(cls, encoder: Encoder, config: EmbeddingConfig, prepared: Prepared) -> Self:
        """The same on an encoder that is there already."""
        return cls(encoder, config, np.array(prepared.ranges, np.float32) if prepared.ranges else None)

    def embed(self, texts: Sequence[str], numbers: Sequence[int]) -> Embedded:
        """Embed texts with these row numbers."""
        vectors, num_tokens, computed = self.embed_exactly(texts, numbers)
        finite: npt.NDArray[np.bool_] = np.asarray(np.isfinite(vectors).all(axis=1))
        vectors[~finite] = 0
        return Embedded(
            quantise(vectors, self.config.vectors.dtype, self.ranges),
            num_tokens,
            finite,
            computed,
        )

    def embed_exactly(
        self, texts: Sequence[str], numbers: Sequence[int]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64], Computed]:
        """Vectors (texts, dim) as float32 before their number type, the tokens of each text, and what was computed."""
        prefixes = self.prefixes or [""]
        keys = [(text, number % len(prefixes)) for text, number in zip(texts, numbers, strict=True)]
        unique = {key: row for row, key in enumerate(dict.fromkeys(keys))}
        chunks, chunks_of_text = self._chunks(list(unique), prefixes)
        tokens = self.encoder.tokenise(chunks)
        vectors = self.encoder.encode_tokens(tokens, self.config.vectors.normalise)
        num_tokens = lengths_of(tokens)
        computed = Computed(len(unique), int(num_tokens.sum()), self.encoder.num_computed(tokens))
        if len(chunks) > len(unique):
            starts = np.cumsum(chunks_of_text) - chunks_of_text
            num_tokens = np.add.reduceat(num_tokens, starts)
            vectors = self._pooled(vectors, chunks_of_text)
        if self.config.vectors.dimensions:
            vectors = truncate(vectors, self.config.vectors.dimensions)
        if len(unique) == len(keys):
            return vectors, num_tokens, computed
        rows = [unique[key] for key in keys]
        return vectors[rows], num_tokens[rows], computed

    def _chunks(
        self, texts: Sequence[tuple[str, int]], prefixes: Sequence[str]
    ) -> tuple[list[str], npt.NDArray[np.int64]]:
        """Prompted texts, or chunks of them, and how many each has."""
        if self.config.long_texts == "truncate":
            return [prefixes[prompt] + text for text, prompt in texts], np.ones(len(texts), np.int64)
        room = [self._room(prefix) for prefix in prefixes]
        chunks = [
            [
                prefixes[prompt] + chunk
                for chunk in split_long(self.encoder.whole_texts, text, room[prompt], self.config.chunk_overlap)
            ]
            for text, prompt in texts
        ]
        return [chunk for row in chunks for chunk in row], np.array([len(row) for row in chunks])

    def _room(self, prefix: str) -> int:
        room = self.encoder.max_seq_length - len(self.encoder.whole_texts.encode(prefix).ids)
        if room <= 2 * self.config.chunk_overlap:
            raise ConfigError(
                f"chunk_overlap: {self.config.chunk_overlap}; expected less than half of the {room} tokens that this "
                "model reads besides its prompt"
            )
        return room

    def _pooled(
        self, vectors: npt.NDArray[np.float32], chunks_of_text: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float32]:
        assert self.config.long_texts != "truncate"  # noqa: S101 (narrows the type)
        pooled = pool_chunks(vectors, chunks_of_text, self.config.long_texts)
        normalise = self.encoder.normalises if self.config.vectors.normalise is None else self.config.vectors.normalise
        return truncate(pooled, pooled.shape[1]) if normalise else pooled


def prepare(
    directory: Path, config: EmbeddingConfig, texts: Sequence[str], device: "torch.device | str", cache: Path
) -> Prepared:
    """Choose the backend and calibrate on `texts`, a sample of what is to be embedded.

    Raises ConfigError where the backend does not pass its gate or the model was not trained for the dimensions.
    """
    require_dimensions(directory, config.vectors)

    def load(name: BackendName) -> Encoder:
        return load_encoder(directory, name, device, cache)

    measured: dict[BackendName, Measured] = {}
    if config.backend is None:
        backend = torch_backend(fast_arithmetic(device))
    elif config.backend == REFERENCE:
        backend = REFERENCE
    else:
        reference = load(REFERENCE)
        sample = with_prompts(texts[:GATE_TEXTS], [reference.prompt(name) for name in config.prompts[:1]])
        backend, measured = choose_backend(
            config.backend, reference, sample, config.gate, load, available_backends(device)
        )
    ranges = None
    if config.vectors.dtype in NEEDS_RANGES:
        vectors, _, _ = TextEmbedder(load(backend), config, None).embed_exactly(texts, range(len(texts)))
        ranges = calibrate(vectors).tolist()
    return Prepared(
        backend=backend,
        measured={
            name: found.agreement._asdict() | {"texts_per_s": found.texts_per_s} for name, found in measured.items()
        },
        ranges=ranges,
    )


def require_dimensions(directory: Path, config: VectorsConfig) -> None:
    """Raise ConfigError where vectors are to be cut to a size that the model was not trained for."""
    trained = trained_dimensions(directory)
    if config.dimensions and config.dimensions not in trained and not config.force_dimensions:
        raise ConfigError(
            f"vectors.dimensions: {config.dimensions}; this model was trained for "
            f"{trained or 'its whole vectors alone'}. Give vectors.force_dimensions to cut them all the same."
        )
