"""Calls in groups: when they go, what each gets, and what becomes of those whose client has gone."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import numpy as np
import pytest

from serve.calls import Answer, Call, Refusal
from serve.grouping import FEW_UNDER_WAY, FULL_CALLS, SMALL_TEXTS, Grouped


class Hop:
    """Answers when it is told to, with the length of each call's first text."""

    def __init__(self) -> None:
        self.sent: list[list[str]] = []
        self.open: list[asyncio.Event] = []
        self.cancelled: list[int] = []

    async def send(self, calls: Sequence[Call]) -> Sequence[Answer | Refusal]:
        number = len(self.sent)
        self.sent.append([str(call.texts[0]) for call in calls])
        self.open.append(asyncio.Event())
        try:
            await self.open[number].wait()
        except asyncio.CancelledError:
            self.cancelled.append(number)
            raise
        if "broken" in self.sent[number]:
            raise RuntimeError("lost")
        return [Answer(np.zeros((1, len(str(call.texts[0])))), 1, "model", 0.0) for call in calls]


def run(story: Callable[[Grouped, Hop], Awaitable[None]]) -> Hop:
    async def whole() -> Hop:
        hop = Hop()
        await story(Grouped(hop.send), hop)
        return hop

    return asyncio.run(whole())


async def asked(grouped: Grouped, *texts: str) -> list[asyncio.Task[Answer | Refusal]]:
    tasks = [asyncio.create_task(grouped.embed(Call([text]))) for text in texts]
    await settle()
    return tasks


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def widths(answers: Sequence[Answer | Refusal]) -> list[int]:
    return [answer.vectors.shape[1] for answer in answers if isinstance(answer, Answer)]


def test_groups_grow_while_others_are_on_their_way_and_each_gets_its_own() -> None:
    async def story(grouped: Grouped, hop: Hop) -> None:
        first = [task for number in range(FEW_UNDER_WAY) for task in await asked(grouped, "a" * (number + 1))]
        later = await asked(grouped, "bbb", "cccc", "d")
        assert [len(group) for group in hop.sent] == [1] * FEW_UNDER_WAY
        hop.open[0].set()
        await settle()
        assert hop.sent[-1] == ["bbb", "cccc", "d"]
        for opened in hop.open:
            opened.set()
        assert widths(await asyncio.gather(*first, *later)) == [*range(1, FEW_UNDER_WAY + 1), 3, 4, 1]

    run(story)


def test_a_large_call_goes_alone_and_at_once() -> None:
    async def story(grouped: Grouped, hop: Hop) -> None:
        await asked(grouped, *(str(number) for number in range(FEW_UNDER_WAY)))
        large = asyncio.create_task(grouped.embed(Call(["many"] * (SMALL_TEXTS + 1))))
        await settle()
        assert hop.sent[-1] == ["many"]
        hop.open[-1].set()
        assert widths([await large]) == [4]

    run(story)


def test_who_has_gone_is_not_sent_and_a_group_of_such_is_cancelled() -> None:
    async def story(grouped: Grouped, hop: Hop) -> None:
        sent = [task for number in range(FEW_UNDER_WAY) for task in await asked(grouped, str(number))]
        gone, stays = await asked(grouped, "gone", "stays")
        gone.cancel()
        sent[0].cancel()
        await settle()
        assert hop.cancelled == [0]
        assert hop.sent[-1] == ["stays"]
        hop.open[-1].set()
        assert widths([await stays]) == [5]

    run(story)


def test_an_error_reaches_all_of_a_group_and_the_next_goes_on() -> None:
    async def story(grouped: Grouped, hop: Hop) -> None:
        await asked(grouped, *(str(number) for number in range(FEW_UNDER_WAY)))
        broken = await asked(grouped, "broken", "with it")
        hop.open[0].set()
        await settle()
        after = await asked(grouped, "after")
        hop.open[-1].set()
        await settle()
        for task in broken:
            with pytest.raises(RuntimeError, match="lost"):
                await task
        hop.open[1].set()
        await settle()
        hop.open[-1].set()
        assert widths(await asyncio.gather(*after)) == [5]

    run(story)


def test_a_full_group_does_not_wait() -> None:
    async def story(grouped: Grouped, hop: Hop) -> None:
        await asked(grouped, *(str(number) for number in range(FEW_UNDER_WAY)))
        await asked(grouped, *["x"] * (2 * FULL_CALLS + 3))
        assert [len(group) for group in hop.sent[FEW_UNDER_WAY:]] == [FULL_CALLS, FULL_CALLS]
        for opened in hop.open:
            opened.set()
        await settle()
        assert hop.sent[-1] == ["x"] * 3

    run(story)
