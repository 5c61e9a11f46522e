"""A client that holds an endpoint to its word: right vectors, or a typed refusal that says when to come back."""

import time

import httpx2
import numpy as np

from embedlib.encoder import Encoder


class Client:
    """Asks for one text until it has its vector; what else it got must be typed and say when to come back."""

    def __init__(self, url: str, models: dict[str, Encoder]) -> None:
        self.url, self.models = url, models
        self.refused = 0

    def ask(self, text: str) -> str:
        """The fingerprint of the model that answered, whose vector it was."""
        for _ in range(60):
            answer = httpx2.post(f"{self.url}/v1/embeddings", json={"model": "full", "input": text}, timeout=60)
            if answer.status_code == 200:
                fingerprint: str = answer.headers["x-fingerprint"]
                expected = self.models[fingerprint].encode([text])[0]
                np.testing.assert_allclose(answer.json()["data"][0]["embedding"], expected, atol=1e-5)
                return fingerprint
            assert answer.status_code == 503, answer.text
            self.refused += 1
            time.sleep(float(answer.headers.get("retry-after", 1)))
        raise AssertionError("no answer after a minute")
