"""The scheduler against a model of a known speed, on a clock that is simulated: no test waits."""

import asyncio
import random
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedlib.batching import TokenIds
from embedlib.encoder import Vectors
from serve.batcher import Batch, Batcher, BatcherConfig, OverloadedError, TooManyTokensError

T = TypeVar("T")
TOKENS_PER_S = 1000.0
ONE_AT_A_TIME = {"in_flight": 1, "max_wait_s": 1e6}


class SimulatedLoop(asyncio.SelectorEventLoop):
    """Instead of waiting for the next timer, the clock is set to it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        select = self._selector.select  # type: ignore[attr-defined]

        def skip(timeout: float | None) -> Any:
            assert timeout is not None, "all wait for each other"
            self.now += timeout
            return select(0)

        self._selector.select = skip  # type: ignore[attr-defined]

    def time(self) -> float:
        return self.now


def simulate(main: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=SimulatedLoop) as runner:
        return runner.run(main)


class Model:
    """Takes its time by tokens; a vector is the sequence's first token and its length."""

    def __init__(self) -> None:
        self.batches: list[list[TokenIds]] = []

    async def __call__(self, sequences: list[TokenIds]) -> Vectors:
        self.batches.append(sequences)
        await asyncio.sleep(sum(map(len, sequences)) / TOKENS_PER_S)
        return np.array([[tokens[0], len(tokens)] for tokens in sequences], np.float32)


def texts(first: int, *lengths: int) -> list[TokenIds]:
    """A sequence of each length; their first tokens count from `first`."""
    return [np.full(length, first + number, np.int32) for number, length in enumerate(lengths)]


class Running:
    """A batcher at work on a model, for the length of a `with`."""

    def __init__(self, **config: float) -> None:
        self.model, self.seen = Model(), list[Batch]()
        self.batcher = Batcher(self.model, BatcherConfig.model_validate(ONE_AT_A_TIME | config), self.seen.append)

    async def __aenter__(self) -> Batcher:
        self.task = asyncio.create_task(self.batcher.run())
        return self.batcher

    async def __aexit__(self, *_: object) -> None:
        self.task.cancel()
        with suppress(asyncio.CancelledError):
            await self.task


async def finished_at(batcher: Batcher, sequences: list[TokenIds], after: float = 0.0) -> float:
    await asyncio.sleep(after)
    await batcher.embed(sequences)
    return asyncio.get_running_loop().time()


requests = st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=12), min_size=1, max_size=12)


@given(requests, st.integers(1, 60), st.integers(1, 5), st.integers(1, 2))
@settings(deadline=None)
def test_every_text_gets_its_own_vector(
    lengths: list[list[int]], batch_tokens: int, look_ahead: int, in_flight: int
) -> None:
    async def main() -> None:
        running = Running(batch_tokens=batch_tokens, look_ahead=look_ahead, in_flight=in_flight)
        sequences = [texts(100 * number, *request) for number, request in enumerate(lengths)]
        async with running as batcher:
            found = await asyncio.gather(*(batcher.embed(request) for request in sequences))
            assert batcher.queued_tokens == 0
            assert batcher.stuck_s == 0
        for request, vectors in zip(sequences, found, strict=True):
            assert vectors.tolist() == [[tokens[0], len(tokens)] for tokens in request]
        sizes = [[len(tokens) for tokens in batch] for batch in running.model.batches]
        assert all(sum(batch) <= batch_tokens or len(batch) == 1 for batch in sizes)
        assert sum(map(sum, sizes)) == sum(map(sum, lengths))
        assert sum(batch.num_sequences for batch in running.seen) == sum(map(len, lengths))

    simulate(main())


def test_batches_fill_while_the_model_works() -> None:
    async def main() -> None:
        running = Running(batch_tokens=1000)
        async with running as batcher:
            await asyncio.gather(*(finished_at(batcher, texts(0, 10), 0.001 * number) for number in range(50)))
        assert [len(batch) for batch in running.model.batches] == [1, 10, 39]

    simulate(main())


def test_a_short_request_does_not_wait_for_a_long_one() -> None:
    async def main() -> None:
        async with Running(batch_tokens=100) as batcher:
            long, short = await asyncio.gather(
                finished_at(batcher, texts(0, *[10] * 1000)), finished_at(batcher, texts(0, 10), after=1.0)
            )
        assert short <= 1.0 + 3 * 100 / TOKENS_PER_S
        assert long == pytest.approx(10_010 / TOKENS_PER_S)

    simulate(main())


def test_a_long_request_is_not_starved_by_short_ones() -> None:
    async def main() -> None:
        """Short requests that alone would keep the model busy for ever."""
        async with Running(batch_tokens=100, max_queued_tokens=10**6) as batcher:
            arrivals = [finished_at(batcher, texts(0, 10), 0.01 * number) for number in range(3000)]
            short = asyncio.gather(*arrivals)
            long = await finished_at(batcher, texts(0, *[10] * 30))
            await short
        assert long < 20

    simulate(main())


def padding_in_batches(look_ahead: int) -> float:
    """Padding, as a share of the tokens, where half of the requests are ten times as long as the others."""

    async def main() -> float:
        running = Running(batch_tokens=200, look_ahead=look_ahead)
        lengths = [5, 50] * 200
        random.Random(0).shuffle(lengths)
        async with running as batcher:
            await asyncio.gather(*(batcher.embed(texts(0, length)) for length in lengths))
        assert sum(batch.num_tokens for batch in running.seen) == sum(lengths)
        return sum(batch.num_sequences * batch.longest for batch in running.seen) / sum(lengths) - 1

    return simulate(main())


def test_like_lengths_go_together() -> None:
    assert padding_in_batches(look_ahead=16) < 0.3 * padding_in_batches(look_ahead=1)


def test_an_odd_length_is_not_passed_over() -> None:
    async def main() -> None:
        async with Running(batch_tokens=200) as batcher:
            before = asyncio.gather(*(batcher.embed(texts(0, 5)) for _ in range(1000)))
            odd = asyncio.create_task(finished_at(batcher, texts(0, 50)))
            await asyncio.sleep(0)
            after = asyncio.gather(*(batcher.embed(texts(0, 5)) for _ in range(1000)))
            assert await odd <= (1000 * 5 + 50 + 2 * 200) / TOKENS_PER_S
            await asyncio.gather(before, after)

    simulate(main())


def test_who_goes_away_is_not_computed() -> None:
    async def main() -> None:
        running = Running(batch_tokens=100)
        async with running as batcher:
            first = asyncio.create_task(batcher.embed(texts(0, 100)))
            gone = asyncio.create_task(batcher.embed(texts(7, *[100] * 5)))
            await asyncio.sleep(0.01)
            assert batcher.queued_tokens == 500
            gone.cancel()
            await first
            assert batcher.queued_tokens == 0
            assert (await batcher.embed(texts(3, 20))).tolist() == [[3, 20]]
        assert [batch[0][0] for batch in running.model.batches] == [0, 3]

    simulate(main())


def test_too_much_is_turned_away_at_the_door() -> None:
    async def main() -> None:
        async with Running(batch_tokens=100, max_queued_tokens=1000) as batcher:
            with pytest.raises(TooManyTokensError, match="1001 tokens; expected at most 1000"):
                await batcher.embed(texts(0, 1001))
            await batcher.embed(texts(0, 100))  # the speed is known now
            admitted = [asyncio.create_task(batcher.embed(texts(0, *[100] * 5))) for _ in range(2)]
            await asyncio.sleep(0.05)
            with pytest.raises(OverloadedError, match="900 tokens are waiting; try again in 1 s") as caught:
                await batcher.embed(texts(0, 200))
            assert caught.value.retry_after_s == 1
            await asyncio.gather(*admitted)
            await batcher.embed(texts(0, 1000))

    simulate(main())


def test_a_failing_batch_fails_its_own_requests_alone() -> None:
    async def main() -> None:
        async def forward(sequences: list[TokenIds]) -> Vectors:
            await asyncio.sleep(0.01)
            if any(tokens[0] == 13 for tokens in sequences):
                raise RuntimeError("out of memory")
            return np.ones((len(sequences), 2), np.float32)

        running = Running(batch_tokens=10)
        running.batcher.forward = forward
        async with running as batcher:
            results = await asyncio.gather(
                batcher.embed(texts(1, 10, 10)), batcher.embed(texts(13, 10)), return_exceptions=True
            )
            assert isinstance(results[0], np.ndarray)
            assert str(results[1]) == "out of memory"
            assert (batcher.queued_tokens, batcher.stuck_s) == (0, 0)

    simulate(main())


def test_a_stuck_model_shows() -> None:
    async def main() -> None:
        async with Running(batch_tokens=100) as batcher:
            waiting = asyncio.create_task(batcher.embed(texts(0, 100_000)))
            await asyncio.sleep(30)
            assert batcher.stuck_s == pytest.approx(30)
            await waiting

    simulate(main())


def test_a_request_that_would_wait_too_long_is_turned_away_and_a_short_one_is_not() -> None:
    async def main() -> tuple[float, int]:
        async with Running(batch_tokens=100, max_wait_s=1.0) as batcher:
            await batcher.embed(texts(0, 100))  # it has seen how fast the model is
            start = asyncio.get_running_loop().time()
            long = asyncio.create_task(batcher.embed(texts(0, *[100] * 20)))
            await asyncio.sleep(0)
            with pytest.raises(OverloadedError) as refused:
                await batcher.embed(texts(0, *[100] * 20))
            short = await finished_at(batcher, texts(0, 5)) - start
            await long
            return short, refused.value.retry_after_s

    short, retry_after_s = simulate(main())
    assert short <= 0.3
    assert retry_after_s == 2
