"""FastAPI round `SentenceTransformer.encode`, as most teams begin.

python -m benchmarks.peers.fastapi_server DIRECTORY PORT
"""

import base64
import sys
from typing import Any

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from sentence_transformers import SentenceTransformer


class Request(BaseModel):
    """OpenAI's body, as far as it is used."""

    input: str | list[str]
    model: str = ""
    encoding_format: str = "float"


def application(directory: str) -> FastAPI:
    """The server of one model."""
    app = FastAPI()
    model = SentenceTransformer(directory)

    @app.post("/v1/embeddings")
    def embeddings(request: Request) -> dict[str, Any]:
        texts = [request.input] if isinstance(request.input, str) else request.input
        vectors = model.encode(texts, batch_size=32, show_progress_bar=False)
        if request.encoding_format == "base64":
            rows: list[Any] = [base64.b64encode(vector.tobytes()).decode() for vector in vectors]
        else:
            rows = vectors.tolist()
        data = [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)]
        return {"object": "list", "data": data, "model": request.model, "usage": {}}

    return app


if __name__ == "__main__":
    uvicorn.run(application(sys.argv[1]), host="127.0.0.1", port=int(sys.argv[2]), log_level="warning")
