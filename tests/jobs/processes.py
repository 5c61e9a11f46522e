"""Find and kill real processes."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import psutil


@contextmanager
def killed_at_the_end(command: list[str]) -> Iterator[None]:
    """Run `command` in the background; at the end SIGKILL it and all below it, wherever it got to."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_ADDRESS")}
    job = subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        kill_tree(job.pid)
        job.wait()


def wait_for(condition: Callable[[], object], what: str, timeout_s: float = 300) -> None:
    """Return when `condition` holds; fail when it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not in {timeout_s:.0f} s"
        time.sleep(0.01)


def ray_processes(name: str) -> list[int]:
    """Ray's processes below this one with `name` in their title: another test's cluster may be on the machine."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has ended
            title = " ".join(process.cmdline())
            if title.startswith("ray::") and name in title:
                found.append(process.pid)
    return found


def kill_ray_workers(name: str) -> list[int]:
    """SIGKILL the Ray processes with `name` in their title; return which."""
    found = ray_processes(name)
    for pid in found:
        with suppress(ProcessLookupError):  # it ended by itself
            os.kill(pid, signal.SIGKILL)
    return found


def kill_tree(pid: int) -> None:
    """SIGKILL a process and all below it: the driver, Ray's daemons and the workers."""
    listing = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True, check=True).stdout
    parents = [tuple(map(int, line.split())) for line in listing.splitlines()[1:]]
    doomed = {pid}
    while more := {child for child, parent in parents if parent in doomed} - doomed:
        doomed |= more
    for each in doomed:
        with suppress(ProcessLookupError):  # it ended by itself
            os.kill(each, signal.SIGKILL)
