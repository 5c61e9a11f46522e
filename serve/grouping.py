"""Calls that go the same way go together: what a message between two processes costs, it costs once for all of them.

A call that comes while nothing is on its way is sent at once. While `FEW_UNDER_WAY` groups are, those that come are the
next group, which goes when one is back or when it is full; so groups grow with the load, nothing waits on a clock, and
what waits is where it is counted: in the queue before the model.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from serve.calls import Answer, Call, Refusal

Send = Callable[[Sequence[Call]], Awaitable[Sequence[Answer | Refusal]]]
# Two on their way keep the model in work while one comes back.
FEW_UNDER_WAY = 2
FULL_CALLS = 16
# A call of more texts has answers to wait for, which the others of a group would wait for, too: it goes alone.
SMALL_TEXTS = 8


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
        if len(self.under_way) >= FEW_UNDER_WAY and len(self.waiting) < FULL_CALLS:
            return
        # Without those whose client has gone.
        group = [(call, answer) for call, answer in self.waiting if not answer.done()]
        self.waiting = []
        if not group:
            return
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
