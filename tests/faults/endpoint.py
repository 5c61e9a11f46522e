"""Clients that ask an endpoint without pause, check every vector, and come back as often as it takes."""

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx2
import numpy as np
import torch

from embedlib.backends import load_encoder

CLIENTS = 4
PATIENCE_S = 90.0
CALM = 60
"""Answers in a row without a retry after which the endpoint counts as recovered."""


class Askers:
    """Threads that ask until they are told to stop."""

    def __init__(self, url: str, model: str) -> None:
        self.url = url
        self.encoder = load_encoder(Path(model), "torch-float32", torch.device("cpu"), Path())
        self.lock = threading.Lock()
        self.asked = self.answered = self.retried = self.lost = self.calm = 0
        self.last_failure = 0.0
        self.error = ""
        self.stopped = threading.Event()
        self.threads = ThreadPoolExecutor(CLIENTS)
        self.loops: list[Future[None]] = []

    def __enter__(self) -> Self:
        self.loops = [self.threads.submit(self.loop, number) for number in range(CLIENTS)]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stopped.set()
        self.threads.shutdown()
        for loop in self.loops:
            loop.result()

    def loop(self, number: int) -> None:
        """One client."""
        while not self.stopped.is_set():
            with self.lock:
                self.asked += 1
                text = f"client {number}, text {self.asked}"
            if not self.ask(text):
                with self.lock:
                    self.lost += 1

    def ask(self, text: str) -> bool:
        """Whether a text got its vector in time."""
        end = time.monotonic() + PATIENCE_S
        expected = None
        while time.monotonic() < end:
            problem, retry_s = "", 0.5
            try:
                answer = httpx2.post(f"{self.url}/v1/embeddings", json={"model": "full", "input": text}, timeout=30)
                if answer.status_code == 200:
                    expected = self.encoder.encode([text])[0] if expected is None else expected
                    right = np.allclose(answer.json()["data"][0]["embedding"], expected, atol=1e-5)
                    with self.lock:
                        self.answered += 1
                        self.calm += 1
                        self.error = self.error if right else f"a wrong vector for {text!r}"
                    return right
                problem = f"{answer.status_code}: {answer.text[:200]}"
                retry_s = min(float(answer.headers.get("retry-after", retry_s)), 5.0)
            except httpx2.TransportError as error:
                problem = repr(error)
            with self.lock:
                self.retried += 1
                self.calm = 0
                self.last_failure = time.monotonic()
            if self.stopped.wait(retry_s) and problem:
                continue  # what was asked is waited for, even at the end
        with self.lock:
            self.error = problem
        return False

    def settle(self, struck: float) -> float:
        """Wait until it answers as before; seconds from the fault to the last request that had to be repeated."""
        with self.lock:
            self.calm = 0
        end = time.monotonic() + PATIENCE_S
        while self.calm < CALM and time.monotonic() < end:
            time.sleep(0.1)
        return max(0.0, self.last_failure - struck)
