"""Clusters of several nodes on this machine, whose parts can be killed: as processes side by side, or in network
namespaces of their own, where a link can be cut."""

import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import psutil
from ray.cluster_utils import Cluster

from tests.jobs.processes import kill_tree, wait_for

CPUS = 2
CLONE_NEWNET = 0x40000000
REDIS_PASSWORD = "of-this-trial"  # noqa: S105 (on loopback, for a minute)


class Machines(Protocol):
    """A running cluster; node 0 is its head."""

    num_nodes: int
    address: str
    """What drivers join."""
    host: str
    """Where the head's own ports are."""

    def find_raylet(self, node: int) -> int | None:
        """Process id of a node's raylet, if it runs."""

    def raylet(self, node: int) -> int:
        """Process id of a node's raylet, which runs."""
        pid = self.find_raylet(node)
        assert pid, f"node {node} has no raylet"
        return pid

    def workers(self, node: int) -> list[psutil.Process]:
        """The workers of a node that are at work."""
        raylet = self.find_raylet(node)
        return workers_of(raylet) if raylet else []

    def restart(self, node: int) -> None:
        """A new node in the place of one that ended, as machines come back."""

    def replace_lost(self) -> None:
        """A new node in the place of each that has ended since."""
        for node in range(1, self.num_nodes):
            if self.find_raylet(node) is None:
                self.restart(node)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@contextmanager
def redis() -> Iterator[str]:
    """A Redis server of this process on loopback; its address."""
    port = free_port()
    command = [
        "redis-server",
        "--port",
        str(port),
        "--bind",
        "127.0.0.1",
        "--save",
        "",
        "--requirepass",
        REDIS_PASSWORD,
    ]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        time.sleep(0.5)
        yield f"127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


class SideBySide(Machines):
    """Nodes as processes of this machine, sharing its address."""

    def __init__(self, num_nodes: int, redis_address: str | None = None) -> None:
        head: dict[str, Any] = {"num_cpus": CPUS}
        if redis_address:
            os.environ["RAY_REDIS_ADDRESS"] = redis_address
            head |= {"gcs_server_port": free_port(), "redis_password": REDIS_PASSWORD}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.nodes = [self.cluster.head_node, *(self.cluster.add_node(num_cpus=CPUS) for _ in range(num_nodes - 1))]
        self.num_nodes = num_nodes
        self.address = self.cluster.address
        self.host = "127.0.0.1"

    def find_raylet(self, node: int) -> int | None:
        """Process id of a node's raylet, if it runs."""
        process = self.nodes[node].all_processes["raylet"][0].process
        return process.pid if process.poll() is None else None

    def gcs(self) -> int:
        """Process id of the head's GCS."""
        pid: int = self.cluster.head_node.all_processes["gcs_server"][0].process.pid
        return pid

    def restart(self, node: int) -> None:
        """A new node in the place of one that ended, as machines come back."""
        self.nodes[node] = self.cluster.add_node(num_cpus=CPUS)

    def restart_gcs(self) -> None:
        """GCS again at its port, with the tables that Redis has."""
        self.cluster.head_node.kill_gcs_server(check_alive=False)
        self.cluster.head_node.start_gcs_server()

    def stop(self) -> None:
        """End all nodes."""
        for node in self.cluster.list_all_nodes():
            with suppress(Exception):  # what was killed is no longer there to be stopped
                node.kill_all_processes(check_alive=False, allow_graceful=False)


class Namespaces(Machines):
    """Nodes in network namespaces of their own, joined by a switch in another one; the host's network is not touched.

    This process moves to the head's, and with it what it starts from then on.
    """

    def __init__(self, num_nodes: int, name: str) -> None:
        self.name, self.num_nodes = name, num_nodes
        self.spaces = [f"{name}-{node}" for node in range(num_nodes)]
        # Ray looks for clusters by address among all processes: that of another one must be another.
        self.subnet = f"10.99.{os.getpid() % 256}"
        self.host = f"{self.subnet}.1"
        self.address = f"{self.host}:6379"
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        self.lay_cables()
        enter(self.spaces[0])
        for node in range(num_nodes):
            self.start(node)

    @staticmethod
    def available() -> bool:
        """Whether this user can make namespaces here."""
        probe = f"embedlib-probe-{os.getpid()}"
        if os.geteuid() or subprocess.run(["ip", "netns", "add", probe], capture_output=True).returncode:
            return False
        links = ["ip", "-n", probe, "link", "add", "b0", "type", "bridge"]
        able = subprocess.run(links, capture_output=True).returncode == 0
        subprocess.run(["ip", "netns", "del", probe], check=True)
        return able

    def lay_cables(self) -> None:
        """One namespace a node and one for the switch between them."""
        switch = f"{self.name}-switch"
        ip("netns", "add", switch)
        ip("-n", switch, "link", "add", "switch", "type", "bridge")
        ip("-n", switch, "link", "set", "switch", "up")
        for node, space in enumerate(self.spaces):
            ip("netns", "add", space)
            ip("-n", switch, "link", "add", f"port{node}", "type", "veth", "peer", "name", "eth0", "netns", space)
            ip("-n", switch, "link", "set", f"port{node}", "master", "switch", "up")
            ip("-n", space, "addr", "add", f"{self.subnet}.{node + 1}/24", "dev", "eth0")
            ip("-n", space, "link", "set", "eth0", "up")
            ip("-n", space, "link", "set", "lo", "up")

    def within(self, node: int, *words: str) -> list[str]:
        """A command as it is run on a node."""
        return ["ip", "netns", "exec", self.spaces[node], *words]

    def start(self, node: int) -> None:
        """Start Ray on a node."""
        ray = [str(Path(sys.executable).parent / "ray"), "start", "--block", "--num-cpus", str(CPUS)]
        ray += ["--node-ip-address", f"{self.subnet}.{node + 1}", "--object-store-memory", str(150 * 2**20)]
        # Without a dashboard, whose ten processes take a busy machine longer than Ray waits for them.
        head = ["--head", "--port", "6379", "--include-dashboard", "false"]
        ray += head if node == 0 else ["--address", self.address]
        self.processes[node] = subprocess.Popen(
            self.within(node, *ray), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        wait_for(lambda: self.find_raylet(node), f"the raylet of node {node}", 120)

    def find_raylet(self, node: int) -> int | None:
        """Process id of a node's raylet, if it runs."""
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.processes[node].pid).children(recursive=True):
                with suppress(psutil.Error):
                    if child.name() == "raylet":
                        return int(child.pid)
        return None

    def cut(self, node: int) -> None:
        """Pull a node's cable."""
        ip("-n", f"{self.name}-switch", "link", "set", f"port{node}", "down")

    def mend(self, node: int) -> None:
        """Plug it in again."""
        ip("-n", f"{self.name}-switch", "link", "set", f"port{node}", "up")

    def restart(self, node: int) -> None:
        """A new node in the place of one that ended, as machines come back."""
        kill_tree(self.processes[node].pid)
        self.start(node)

    def stop(self) -> None:
        """End all nodes and take the cables away."""
        for process in self.processes.values():
            kill_tree(process.pid)
            process.wait()
        for space in [*self.spaces, f"{self.name}-switch"]:
            subprocess.run(["ip", "netns", "del", space], check=False)


def enter(space: str) -> None:
    """Move this thread, and threads and processes that it will start, to a network namespace."""
    with open(f"/run/netns/{space}") as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter {space}")


def ip(*words: str) -> None:
    """Run `ip`."""
    subprocess.run(["ip", *words], check=True, capture_output=True)


def workers_of(raylet: int) -> list[psutil.Process]:
    """The workers of a raylet that are at work; not its agents."""
    with suppress(psutil.NoSuchProcess):
        below = {child: title_of(child) for child in psutil.Process(raylet).children(recursive=True)}
        others = re.compile("IDLE|Agent|_UsageCollectionActor")
        return [child for child, title in below.items() if title.startswith("ray::") and not others.search(title)]
    return []


def title_of(process: psutil.Process) -> str:
    """What a process calls itself."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def pause(process: psutil.Process, seconds: float) -> None:
    """Stop a process and let it go on."""
    with suppress(psutil.Error):
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(seconds)
        os.kill(process.pid, signal.SIGCONT)
