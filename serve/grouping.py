"""Calls that go the same way go together: what a message between two processes costs, it costs once for all of them.

A call that comes while nothing is on its way is sent at once. While `MOST_UNDER_WAY` groups are, those that come are
the next group; so groups grow with the load, and nothing waits on a clock.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from serve.calls import Answer, Call, Refusal

Send = Callable[[Sequence[Call]], Awaitable[Sequence[Answer | Refusal]]]
# Two on their way keep the model in work while one comes back; more would make groups too small to save anything.
MOST_UNDER_WAY = 2
# A call of more texts has answers to wait for, which the others of a group would wait for, too: it goes alone.
SMALL_TEXTS = 8
MOST_CALLS = 256


class Grouped:
    """Sends small calls in groups, and gives each its own answer."""

    def __init__(self, send: Send) -> None:
        """`send` takes some calls to where they are answered, and gives their answers in order."""
        self.send = send
        self.waiting: list[tuple[Call, asyncio.Future[Answer | Refusal]]] = []
        self.under_way: set[asyncio.Task[None]] = set()

    async def embed(self, call: Call) -> Answer | Refusal:
        """The answer to a call; where whoever asks goes away, it is forgotten unless it has been sent with others."""
        if len(call.texts) > SMALL_TEXTS:
            return (await self.send([call]))[0]
        answer: asyncio.Future[Answer | Refusal] = asyncio.get_running_loop().create_future()
        self.waiting.append((call, answer))
        self._send_waiting()
        return await answer

    def _send_waiting(self) -> None:
        # Who has gone is left out.
        self.waiting = [(call, answer) for call, answer in self.waiting if not answer.done()]
        if not self.waiting or len(self.under_way) >= MOST_UNDER_WAY:
            return
        group, self.waiting = self.waiting[:MOST_CALLS], self.waiting[MOST_CALLS:]
        task = asyncio.create_task(self._ask(group))
        self.under_way.add(task)
        task.add_done_callback(self._came_back)

        def forget(_: asyncio.Future[Answer | Refusal]) -> None:
            if all(answer.done() for _, answer in group):
                task.cancel()

        for _, answer in group:
            answer.add_done_callback(forget)

    def _came_back(self, task: asyncio.Task[None]) -> None:
        self.under_way.discard(task)
        self._send_waiting()

    async def _ask(self, group: Sequence[tuple[Call, asyncio.Future[Answer | Refusal]]]) -> None:
        try:
            answers = await self.send([call for call, _ in group])
        except Exception as error:  # whatever it is, those who wait for it must hear of it
            for _, answer in group:
                if not answer.done():
                    answer.set_exception(error)
            return
        for (_, answer), found in zip(group, answers, strict=True):
            if not answer.done():
                answer.set_result(found)
