"""What the gateway and the replicas of a model say to each other: tuples that pickle, and load no model library."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy.typing as npt
from prometheus_client import Metric

from serve.schemas import InputType, Text

if TYPE_CHECKING:
    from embedlib.quantization import OutputDtype

# The prompts that stand for an input type, best first.
PROMPTS_OF: dict[InputType, Sequence[str]] = {"query": ("query",), "document": ("document", "passage", "corpus")}


def prompt_for(input_type: InputType | None, known: Iterable[str]) -> str | None:
    """The prompt, among those that a model knows, for texts of this type; none where it has none for it."""
    return next((name for name in PROMPTS_OF[input_type] if name in known), None) if input_type else None


class Call(NamedTuple):
    """What a client wants embedded, and in which form."""

    texts: Sequence[Text]
    """Texts, or token ids with their prompt and special tokens."""
    prompt: str | None = None
    """Name of the prompt to put before the texts."""
    input_type: InputType | None = None
    """What the texts are, where no prompt is named; a model that knows no prompt for it gets the bare text."""
    normalise: bool | None = None
    """Unit vectors, or as pooled; none: as the model does."""
    dimensions: int | None = None
    """Only so many first dimensions, as unit vectors."""
    dtype: "OutputDtype" = "float32"
    """Number type of the vectors."""
    truncate: bool = True
    """Cut texts that are longer than the model reads; otherwise they are refused."""


class Answer(NamedTuple):
    """Vectors, and what made them."""

    vectors: npt.NDArray[Any]
    """(texts, dim) in the number type asked for."""
    num_tokens: int
    """Tokens that all texts together cost."""
    fingerprint: str
    """Of the model that made them."""
    seconds: float
    """From the call's arrival at the replica to its answer."""


class Refusal(NamedTuple):
    """Why there are no vectors. A value and no exception: Ray would send a traceback with every one."""

    reason: Literal["invalid", "too_large", "overloaded", "failed"]
    message: str
    param: str | None = None
    """The part of the call that cannot be had."""
    retry_after_s: int | None = None
    """When to come back."""


class Description(NamedTuple):
    """What a model is, for those who ask."""

    embedding_dim: int
    dimensions: list[int]
    """Sizes to which its vectors may be cut."""
    max_tokens: int
    num_parameters: int
    fingerprint: str
    backend: str
    prompts: list[str]
    retention: dict[str, float] | None
    """What distillation measured the model to keep of its teacher; none where it is not known."""


class Model(Protocol):
    """What the gateway knows of a model, wherever it runs."""

    async def embed(self, call: Call) -> Answer | Refusal:
        """Vectors, or why there are none."""
        ...

    async def describe(self) -> Description | None:
        """What the model is; none where it has no replica, and none is woken for it."""
        ...

    async def collect(self) -> dict[str, list[Metric]]:
        """The metrics of each of its replicas."""
        ...
