"""What clients send and get: OpenAI's embeddings, text-embeddings-inference's, and errors in OpenAI's shape."""

import base64
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, StrictInt, StrictStr, model_validator
from pydantic_core import to_json

from embedlib.config import Config

InputType = Literal["query", "document"]
VectorDtype = Literal["float", "float16", "int8", "uint8", "binary", "ubinary"]
TokenId = Annotated[StrictInt, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
Text = StrictStr | list[TokenId]
# The first error of a list is told, and no other: a body of millions of wrong items must not become as many messages.
Texts = Annotated[list[StrictStr], Field(min_length=1, fail_fast=True)]


class EmbeddingsRequest(Config):
    """`POST /v1/embeddings`: OpenAI's fields, and what a retrieval model needs besides."""

    input: (
        StrictStr
        | Texts
        | Annotated[TokenIds, Field(min_length=1)]
        | Annotated[list[TokenIds], Field(min_length=1, fail_fast=True)]
    )
    """A text, texts, the token ids of a text, or of texts."""
    model: StrictStr
    """Which model; `GET /v1/models` lists them."""
    dimensions: StrictInt | None = Field(default=None, ge=1)
    """Only so many first dimensions, as unit vectors."""
    encoding_format: Literal["float", "base64"] = "float"
    """Vectors as lists of numbers, or as the base64 of their little-endian bytes."""
    user: StrictStr | None = None
    """Taken and not used, as OpenAI's clients may send it."""
    input_type: InputType | None = None
    """What the texts are: the model's prompt for it is put before them."""
    output_dtype: VectorDtype = "float"
    """Number type of the vectors; binary and ubinary hold eight signs a byte."""
    item_errors: bool = False
    """Texts that cannot be embedded get an error in their place, instead of failing the request."""
    fallback: StrictStr | None = None
    """Another model that may answer where this one is over its limit; the answer says which did."""

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        if self.fallback == self.model:
            raise ValueError("fallback: expected another model than `model`")
        if self.input_type and not isinstance(self.texts[0], str):
            raise ValueError("input_type: a prompt goes before text; token ids hold theirs already")
        return self

    @property
    def texts(self) -> list[Text]:
        """One entry a vector."""
        if isinstance(self.input, str):
            return [self.input]
        return [self.input] if isinstance(self.input[0], int) else list(self.input)


class TeiRequest(Config):
    """`POST /embed`, as text-embeddings-inference has it."""

    inputs: StrictStr | Texts
    """A text, or texts."""
    normalize: bool = True
    """Unit vectors; otherwise as pooled."""
    truncate: bool = False
    """Cut texts that are longer than the model reads, instead of refusing them."""
    prompt_name: StrictStr | None = None
    """Name of the prompt to put before the texts."""

    @property
    def texts(self) -> list[Text]:
        """One entry a vector."""
        return [self.inputs] if isinstance(self.inputs, str) else list(self.inputs)


class SimilarityRequest(Config):
    """`POST /v1/similarity`: the cosines of every text with every other."""

    model: StrictStr
    """Which model."""
    input: Texts
    """The texts, by rows."""
    other: Texts | None = None
    """The texts, by columns; none: the same."""
    input_type: InputType | None = None
    """What the texts are."""


class ErrorDetail(Config):
    """What went wrong."""

    message: str
    """In words, naming the value and what was expected."""
    type: str
    """Its kind, as OpenAI's clients know it."""
    param: str | None
    """The part of the request."""
    code: str | None
    """Its name, for programs."""


class ErrorBody(Config):
    """An error as OpenAI's clients read it."""

    error: ErrorDetail


def embeddings_body(
    vectors: npt.NDArray[Any],
    model: str,
    num_tokens: int,
    encoding_format: Literal["float", "base64"],
    errors: Mapping[int, ErrorDetail] = MappingProxyType({}),
) -> bytes:
    """The JSON answer to an EmbeddingsRequest, of vectors (texts, dim) in their number type.

    `errors` are those of texts that have no vector, by their place among all texts.
    """
    rows: Iterator[Any]
    if encoding_format == "base64":
        rows = (base64.b64encode(np.ascontiguousarray(row).tobytes()).decode() for row in vectors)
    else:
        rows = iter(vectors.tolist())
    data = [
        {"object": "error", "index": index, "error": errors[index]}
        if index in errors
        else {"object": "embedding", "index": index, "embedding": next(rows)}
        for index in range(len(vectors) + len(errors))
    ]
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    return to_json({"object": "list", "data": data, "model": model, "usage": usage})


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> bytes:
    """An error as OpenAI's clients read it."""
    return to_json(ErrorBody(error=ErrorDetail(message=message, type=kind, param=param, code=code)))
