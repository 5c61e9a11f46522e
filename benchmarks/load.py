"""Open-loop load on an embeddings endpoint, from a process of its own: requests start on time, answered or not.

    python -m benchmarks.load URL TEXTS.json --rate 50 --seconds 30 [--texts 1] [--body JSON]

prints a JSON list with [start, seconds, status, typed] for every request, times since the load began. A request that no
answer ends has the status 0. Latency counts from when a request was due, so that a server that stalls cannot hide it.
"""

import argparse
import asyncio
import json
import os
import random
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp

TIMEOUT_S = 60.0
PRIORITY = -10


class Load(NamedTuple):
    """What is asked."""

    url: str
    rate: float
    """Requests a second, at random moments (a Poisson process)."""
    seconds: float
    texts: int
    """Texts of a request."""
    body: dict[str, Any]
    """The rest of a request."""
    under_way: int | None = None
    """Instead of a rate: so many requests are always under way."""


class Sent(NamedTuple):
    """A request and how it ended."""

    start: float
    seconds: float
    status: int
    typed: bool
    """Whether the answer, if it was no success, was an error in OpenAI's shape with Retry-After."""


async def send(load: Load, texts: Sequence[str], seed: int) -> list[Sent]:
    """Send requests with texts drawn from `texts`, and wait until all have ended."""
    chance = random.Random(seed)
    sent: list[Sent] = []
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=30)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=TIMEOUT_S)) as session:
        begun = time.perf_counter()

        async def ask(due: float) -> None:
            chosen = chance.choices(texts, k=load.texts)
            body = json.dumps(load.body | {"input": chosen if load.texts > 1 else chosen[0]}).encode()
            status, typed = await answered(session, load, body)
            sent.append(Sent(due, time.perf_counter() - begun - due, status, typed))

        async def ask_on() -> None:
            while (now := time.perf_counter() - begun) < load.seconds:
                await ask(now)

        if load.under_way:
            await asyncio.gather(*(ask_on() for _ in range(load.under_way)))
        else:
            due, tasks = 0.0, []
            while due < load.seconds:
                await asyncio.sleep(max(0.0, begun + due - time.perf_counter()))
                tasks.append(asyncio.create_task(ask(due)))
                due += chance.expovariate(load.rate)
            await asyncio.gather(*tasks)
    return sent


async def answered(session: aiohttp.ClientSession, load: Load, body: bytes) -> tuple[int, bool]:
    """The status that a request ends with, and whether an error came with all that a client needs to go on."""
    status, typed = 0, False
    try:
        async with session.post(load.url, data=body, headers={"content-type": "application/json"}) as response:
            content = await response.read()
            status = response.status
            typed = b'"error"' in content and "retry-after" in response.headers
    except (aiohttp.ClientError, TimeoutError):
        pass
    return status, typed


def take_priority() -> None:
    """Before the servers, where that is allowed: clients have machines of their own, and a load that waits for a core
    measures itself."""
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, PRIORITY)
        Path("/proc/self/autogroup").write_text(str(PRIORITY))


def main() -> None:
    """Send what the command line says."""
    parser = argparse.ArgumentParser(description="Open-loop load on an embeddings endpoint.")
    parser.add_argument("url")
    parser.add_argument("file", type=Path, help="JSON list of texts")
    parser.add_argument("--rate", type=float, default=1.0, help="requests a second")
    parser.add_argument("--under-way", type=int, help="instead: requests that are always under way")
    parser.add_argument("--seconds", type=float, required=True, help="how long new requests are sent")
    parser.add_argument("--texts", type=int, default=1, help="texts of a request")
    parser.add_argument("--body", type=json.loads, default={}, help="the rest of a request, as JSON")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    load = Load(options.url, options.rate, options.seconds, options.texts, options.body, options.under_way)
    take_priority()
    sent = asyncio.run(send(load, json.loads(options.file.read_text()), options.seed))
    json.dump(sent, sys.stdout)


if __name__ == "__main__":
    main()
