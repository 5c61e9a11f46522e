"""Ray Serve's own recipe for batches, `@serve.batch`: `serve run benchmarks.peers.serve_batch:build model=DIR`."""

from typing import Any

import torch
from ray import serve
from sentence_transformers import SentenceTransformer
from starlette.requests import Request


@serve.deployment(max_ongoing_requests=1000, ray_actor_options={"num_cpus": 2})
class Batched:
    """The model behind Ray's own batching."""

    def __init__(self, directory: str, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        self.model = SentenceTransformer(directory)

    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.01)
    async def embed(self, texts: list[str]) -> list[list[float]]:
        """Vectors of the texts that came together."""
        vectors: list[list[float]] = self.model.encode(texts, batch_size=32, show_progress_bar=False).tolist()
        return vectors

    async def __call__(self, request: Request) -> dict[str, Any]:
        """One text a request."""
        body = await request.json()
        vector = await self.embed(body["input"])
        data = [{"object": "embedding", "index": 0, "embedding": vector}]
        return {"object": "list", "data": data, "model": body.get("model", ""), "usage": {}}


def build(arguments: dict[str, str]) -> serve.Application:
    """The application of one model directory."""
    return Batched.bind(arguments["model"], int(arguments["threads"]))
