import base64
import json
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from serve.schemas import EmbeddingsRequest, SimilarityRequest, TeiRequest, embeddings_body, error_body


@pytest.mark.parametrize(
    ("value", "texts"),
    [
        ("one", ["one"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2, 3], [[1, 2, 3]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        ([[]], [[]]),  # a text of no tokens is refused by the model's door, with its number
    ],
)
def test_all_forms_of_input(value: Any, texts: list[Any]) -> None:
    assert EmbeddingsRequest(input=value, model="m").texts == texts


@pytest.mark.parametrize(
    ("values", "where"),
    [
        ({"input": []}, "input"),
        ({"input": ["a", 1]}, "input"),
        ({"input": [1, -1]}, "input"),
        ({"input": [True]}, "input"),
        ({"input": None}, "input"),
        ({"input": {"a": 1}}, "input"),
        ({"dimensions": 0}, "dimensions"),
        ({"dimensions": float("nan")}, "dimensions"),
        ({"dimensions": "8"}, "dimensions"),
        ({"encoding_format": "hex"}, "encoding_format"),
        ({"output_dtype": "float8"}, "output_dtype"),
        ({"input_type": "passage"}, "input_type"),
        ({"input": [1, 2], "input_type": "query"}, "input_type"),
        ({"fallback": "m"}, "fallback"),
        ({"dimension": 8}, "dimension"),
        ({"model": None}, "model"),
    ],
)
def test_what_cannot_be_meant_is_refused(values: dict[str, Any], where: str) -> None:
    with pytest.raises(ValidationError, match=where):
        EmbeddingsRequest.model_validate({"input": "a", "model": "m"} | values)


def test_other_requests() -> None:
    assert TeiRequest(inputs="a").texts == TeiRequest(inputs=["a"]).texts == ["a"]
    with pytest.raises(ValidationError, match="inputs"):
        TeiRequest(inputs=[])
    with pytest.raises(ValidationError, match="other"):
        SimilarityRequest(model="m", input=["a"], other=[])


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8, np.uint8])
def test_vectors_survive_their_body(dtype: type) -> None:
    vectors = np.arange(6).reshape(2, 3).astype(dtype)[:, ::-1]
    body = json.loads(embeddings_body(vectors, "m", 7, "float"))
    assert body["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
    assert [row["index"] for row in body["data"]] == [0, 1]
    assert [row["embedding"] for row in body["data"]] == vectors.tolist()
    encoded = json.loads(embeddings_body(vectors, "m", 7, "base64"))["data"]
    for row, vector in zip(encoded, vectors, strict=True):
        assert np.frombuffer(base64.b64decode(row["embedding"]), dtype).tolist() == vector.tolist()


def test_errors_have_openais_shape() -> None:
    body = json.loads(error_body("no such model", "invalid_request_error", "model", "model_not_found"))
    expected = {
        "message": "no such model",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }
    assert body == {"error": expected}
