"""An embedlib encoder as mteb asks for one, with every vector kept: a text is embedded once, whatever tasks have it."""

import hashlib
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models.abs_encoder import AbsEncoder, get_prompt_name
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.types import PromptType

from embedlib.encoder import Encoder, Vectors
from embedlib.errors import DataError
from embedlib.evaluation.comparison import symmetric_prompt
from embedlib.quantization import truncate

KEY_BYTES = 16
# Raised when the same weights give another vector, so that those kept before are not taken for it.
ENCODING_VERSION = 1
Keys = npt.NDArray[np.void]


class VectorCache:
    """Vectors of one model on disk, by prompt and text; several processes may add to it at once.

    It is a directory of parts: `{name}.vectors.npy` (rows, dim) float32 and, written last, `{name}.keys.npy`.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._vectors: list[Vectors] = []
        self._places: dict[bytes, tuple[int, int]] = {}
        self._read: set[str] = set()

    def refresh(self) -> None:
        """See what other processes have added."""
        for path in sorted(self.directory.glob("*.keys.npy")):
            if path.name in self._read:
                continue
            keys = np.load(path)
            vectors = np.load(path.with_name(path.name.replace(".keys.", ".vectors.")), mmap_mode="r")
            part = len(self._vectors)
            self._vectors.append(vectors)
            self._places |= {key.tobytes(): (part, row) for row, key in enumerate(keys)}
            self._read.add(path.name)

    def missing(self, keys: Sequence[bytes]) -> list[int]:
        """Which of the keys have no vector yet; of equal keys the first."""
        first = {key: number for number, key in reversed(list(enumerate(keys)))}
        return sorted(number for key, number in first.items() if key not in self._places)

    def add(self, keys: Sequence[bytes], vectors: Vectors) -> None:
        """Keep the vectors (len(keys), dim), whole or not at all."""
        self.directory.mkdir(parents=True, exist_ok=True)
        name = uuid.uuid4().hex
        packed = np.frombuffer(b"".join(keys), dtype=f"V{KEY_BYTES}")
        for kind, values in (("vectors", vectors), ("keys", packed)):
            scratch = self.directory / f".{name}.{kind}.npy"
            np.save(scratch, values)
            scratch.replace(self.directory / f"{name}.{kind}.npy")
        self.refresh()

    def get(self, keys: Sequence[bytes]) -> Vectors:
        """Vectors (len(keys), dim) of keys that are all known."""
        places = [self._places[key] for key in keys]
        vectors = np.empty((len(keys), self._vectors[0].shape[1]), np.float32)
        parts = np.array([part for part, _ in places])
        rows = np.array([row for _, row in places])
        for part in np.unique(parts):
            chosen = parts == part
            vectors[chosen] = self._vectors[part][rows[chosen]]
        return vectors


def key_of(prefix: str, text: str) -> bytes:
    """What a text under a prompt is found by."""
    return hashlib.blake2b(f"{len(prefix)}:{prefix}{text}".encode(), digest_size=KEY_BYTES).digest()


class CachedEncoder(AbsEncoder):
    """What mteb's tasks call: the prompt that suits the task, and vectors out of the cache where it has them."""

    def __init__(
        self,
        load: Callable[[], Encoder],
        prompts: dict[str, str],
        cache: VectorCache,
        name: str,
        revision: str,
        dimensions: int | None = None,
    ) -> None:
        """`load` is called for the first text that has no vector yet; `revision` is the model's fingerprint.

        The cache holds whole vectors; those that are given are cut to `dimensions`.
        """
        self._load, self.prompts, self.cache = load, prompts, cache
        self._encoder: Encoder | None = None
        self.name, self.dimensions = name, dimensions
        self.texts = self.kept = 0
        """Texts that were asked for so far, and those of them that had a vector, or the same as another one."""
        self.mteb_model_meta = model_meta(name, revision)

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **_: Any,
    ) -> Vectors:
        """Vectors (texts, dim) of a data loader's texts; DataError where the model gives one that is not finite."""
        return self.embed(inputs.dataset["text"], prompt_for(self.prompts, task_metadata, prompt_type))

    def embed(self, texts: Sequence[str], prompt_name: str | None) -> Vectors:
        """Vectors (len(texts), dim) under a prompt of the model."""
        prefix = self.prompts[prompt_name] if prompt_name else ""
        texts = list(texts)
        keys = [key_of(prefix, text) for text in texts]
        self.cache.refresh()
        rows = self.cache.missing(keys)
        self.texts, self.kept = self.texts + len(texts), self.kept + len(texts) - len(rows)
        if rows:
            if self._encoder is None:
                self._encoder = self._load()
            vectors = self._encoder.encode([texts[row] for row in rows], prompt_name)
            finite = np.isfinite(vectors).all(axis=1)
            if not finite.all():
                first = texts[rows[int(np.argmin(finite))]]
                raise DataError(
                    f"the model gave {int((~finite).sum())} of {len(rows)} texts a vector that is not finite; "
                    f"the first: {first[:80]!r}"
                )
            self.cache.add([keys[row] for row in rows], vectors)
        vectors = self.cache.get(keys)
        return truncate(vectors, self.dimensions) if self.dimensions else vectors


def prompt_for(prompts: dict[str, str], task: TaskMetadata, prompt_type: PromptType | None) -> str | None:
    """The name of the prompt for one side of a task.

    A prompt that has the name of the task, of its type or of the side goes first, as mteb has it (`STS`, `Clustering`).
    Else documents get `passage`, and both sides of a symmetric task, with texts that are classified or clustered, what
    `symmetric_prompt` says.
    """
    if name := get_prompt_name(prompts, task, prompt_type):
        return name
    if prompt_type == PromptType.document:
        return "passage" if "passage" in prompts else None
    return None if prompt_type else symmetric_prompt(prompts)


def model_meta(name: str, revision: str) -> ModelMeta:
    """A model as mteb notes it; the fingerprint is the revision, so that no score of other weights can stand for it."""
    values: dict[str, Any] = dict.fromkeys(
        field for field, definition in ModelMeta.model_fields.items() if definition.is_required()
    )
    return ModelMeta(
        **values
        | {
            "name": f"embedlib/{name}",
            "revision": revision,
            "framework": ["Sentence Transformers", "PyTorch"],
            "similarity_fn_name": ScoringFunction.COSINE,
        }
    )
