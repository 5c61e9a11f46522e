"""One scheduler before one model: whose tokens go next, which go together, and who is turned away.

Every request gets an equal share of the model's tokens, by virtual time as in fair queueing (Demers, Keshav, Shenker
1989): a request of thousands of texts goes in many batches, and a short one that comes later goes in between. A batch
is made only when the model is free, of the most urgent sequence and, among the next most urgent, those nearest to it in
length; so batches fill while the model works, and nothing waits on a clock.
"""

import asyncio
import heapq
import math
from collections.abc import Awaitable, Callable, Sequence
from itertools import count
from typing import NamedTuple

import numpy as np
from pydantic import Field

from embedlib.batching import TokenIds
from embedlib.config import Config
from embedlib.encoder import Vectors

Forward = Callable[[list[TokenIds]], Awaitable[Vectors]]
"""Token sequences to vectors (len(sequences), embedding_dim)."""
# Weight of the newest batch in the running rate that tells a client when to come back.
RATE_WEIGHT = 0.2


class BatcherConfig(Config):
    """How much is computed at once and how much may wait."""

    batch_tokens: int = Field(default=1024, ge=1)
    """Tokens of a batch; a longer sequence goes alone. A GPU is full at about 16384."""
    look_ahead: int = Field(default=4, ge=1)
    """Batches' worth of waiting sequences among which those of like length are found."""
    in_flight: int = Field(default=2, ge=1)
    """Batches that the model is given at once: with 2 it has the next one when it has done one."""
    max_wait_s: float = Field(default=0.5, gt=0)
    """How long a request may expect to wait for others; one that would wait longer is turned away."""
    max_queued_tokens: int = Field(default=131_072, ge=1)
    """Tokens that may wait at all."""


class OverloadedError(Exception):
    """More waits than may; come back in `retry_after_s`."""

    def __init__(self, queued_tokens: int, retry_after_s: int) -> None:
        super().__init__(f"{queued_tokens} tokens are waiting; try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class TooManyTokensError(Exception):
    """A request that no empty queue would hold."""


class Batch(NamedTuple):
    """What a batch was, for metrics."""

    num_sequences: int
    num_tokens: int
    longest: int
    """Tokens of its longest sequence; sequences × longest is what a model that pads computes."""
    waited_s: float
    """Age of its oldest sequence when it began."""
    seconds: float


class _Request:
    """A request on its way: vectors that are there, and what still waits."""

    def __init__(self, sequences: Sequence[TokenIds], arrived: float) -> None:
        self.vectors: dict[int, Vectors] = {}
        self.num_sequences = len(sequences)
        self.waiting_tokens = sum(map(len, sequences))
        self.longest = max(map(len, sequences))
        self.arrived = arrived
        self.done: asyncio.Future[Vectors] = asyncio.get_running_loop().create_future()

    def put(self, row: int, vector: Vectors) -> None:
        """Keep the vector (embedding_dim,) of a row; the last one ends the wait."""
        self.vectors[row] = vector
        if len(self.vectors) == self.num_sequences and not self.done.done():
            self.done.set_result(np.stack([self.vectors[row] for row in range(self.num_sequences)]))


class _Waiting(NamedTuple):
    """A sequence in the queue; tuples compare by urgency, then by arrival."""

    urgency: float
    number: int
    row: int
    tokens: TokenIds
    request: _Request


class Batcher:
    """The queue of one model. `run` must be running for `embed` to get anywhere."""

    def __init__(
        self, forward: Forward, config: BatcherConfig, on_batch: Callable[[Batch], None] = lambda batch: None
    ) -> None:
        self.forward, self.config, self.on_batch = forward, config, on_batch
        self.queued_tokens = 0
        self.tokens_per_s = 0.0
        self.busy_s = 0.0
        self._queue: list[_Waiting] = []
        self._requests: set[_Request] = set()
        self._virtual_time = 0.0
        self._numbers = count()
        self._begun: dict[asyncio.Task[None], float] = {}
        self._filled = asyncio.Event()

    async def embed(self, sequences: Sequence[TokenIds]) -> Vectors:
        """Vectors (len(sequences), embedding_dim) of at least one sequence; an error at the door where it is full."""
        loop = asyncio.get_running_loop()
        request = _Request(sequences, loop.time())
        self._admit(request.waiting_tokens)
        urgency = self._virtual_time
        for row, tokens in enumerate(sequences):
            heapq.heappush(self._queue, _Waiting(urgency, next(self._numbers), row, tokens, request))
            urgency += len(tokens)
        self._requests.add(request)
        self.queued_tokens += request.waiting_tokens
        self._filled.set()
        try:
            return await request.done
        finally:  # where the client went away, what still waits is forgotten
            self._requests.discard(request)
            self.queued_tokens -= request.waiting_tokens
            request.waiting_tokens = 0

    def _admit(self, num_tokens: int) -> None:
        if num_tokens > self.config.max_queued_tokens:
            raise TooManyTokensError(
                f"{num_tokens} tokens; expected at most {self.config.max_queued_tokens} in a request"
            )
        # Equal shares: of every other request as much goes before as this one has itself, and the text that is next.
        before = sum(min(request.waiting_tokens, num_tokens + request.longest) for request in self._requests)
        wait_s = before / self.tokens_per_s if self.tokens_per_s else 0.0
        if wait_s > self.config.max_wait_s or self.queued_tokens + num_tokens > self.config.max_queued_tokens:
            raise OverloadedError(self.queued_tokens, max(1, math.ceil(wait_s)))

    async def run(self) -> None:
        """Feed the model until cancelled; then the batches in flight are awaited, and no other begins."""
        free = asyncio.Semaphore(self.config.in_flight)
        try:
            while True:
                await free.acquire()
                while not (batch := self._next_batch()):
                    self._filled.clear()
                    await self._filled.wait()
                task = asyncio.create_task(self._compute(batch))
                self._begun[task] = asyncio.get_running_loop().time()
                task.add_done_callback(self._begun.pop)
                task.add_done_callback(lambda _: free.release())
        finally:
            await asyncio.gather(*self._begun, return_exceptions=True)

    @property
    def stuck_s(self) -> float:
        """Seconds that the oldest batch has been with the model; 0 where none is."""
        return asyncio.get_running_loop().time() - min(self._begun.values()) if self._begun else 0.0

    def _next_batch(self) -> list[_Waiting]:
        """The most urgent sequence, and those of the next ones that are nearest to it in length."""
        window, ahead = [], 0
        while self._queue and ahead < self.config.look_ahead * self.config.batch_tokens:
            waiting = heapq.heappop(self._queue)
            if not waiting.request.done.done():  # its client is still there
                window.append(waiting)
                ahead += len(waiting.tokens)
        if not window:
            return []
        first = len(window[0].tokens)
        window.sort(key=lambda waiting: (abs(len(waiting.tokens) - first), waiting.urgency, waiting.number))
        num_tokens, size = 0, 0
        for waiting in window:
            num_tokens += len(waiting.tokens)
            if size and num_tokens > self.config.batch_tokens:
                break
            size += 1
        for waiting in window[size:]:
            heapq.heappush(self._queue, waiting)
        self._take(window[:size])
        return window[:size]

    def _take(self, batch: Sequence[_Waiting]) -> None:
        num_tokens = sum(len(waiting.tokens) for waiting in batch)
        self._virtual_time += num_tokens / len(self._requests)
        self.queued_tokens -= num_tokens
        for waiting in batch:
            waiting.request.waiting_tokens -= len(waiting.tokens)

    async def _compute(self, batch: list[_Waiting]) -> None:
        clock = asyncio.get_running_loop().time
        begun = clock()
        try:
            vectors = await self.forward([waiting.tokens for waiting in batch])
        except Exception as error:  # whatever it is, those who wait for it must hear of it
            for waiting in batch:
                if not waiting.request.done.done():
                    waiting.request.done.set_exception(error)
            return
        for waiting, vector in zip(batch, vectors, strict=True):
            waiting.request.put(waiting.row, vector)
        lengths, seconds = [len(waiting.tokens) for waiting in batch], max(clock() - begun, 1e-9)
        rate = sum(lengths) / seconds
        self.tokens_per_s += (rate - self.tokens_per_s) * (RATE_WEIGHT if self.tokens_per_s else 1.0)
        waited = begun - min(waiting.request.arrived for waiting in batch)
        self.busy_s += seconds
        self.on_batch(Batch(len(batch), sum(lengths), max(lengths), waited, seconds))
