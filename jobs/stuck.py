"""Workers of a training that have their places and say nothing: these are taken away, and Ray Train begins anew.

A GCS that dies while Ray Train starts a worker can lose it (Ray 2.60): the place is there, the process that was to have
it is not, and Ray Train waits without end. Without the place it takes the worker for failed, and goes on from the last
checkpoint. So it does where workers come no further than their imports.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

from embedlib.storage import Store
from jobs.metrics import NOTE

LOOK_EVERY_S = 5.0


@contextmanager
def stuck_workers_give_way(run: Store, stuck_after_s: float) -> Iterator[None]:
    """While it lasts, and for the job of this driver: `run` is the directory where the first worker leaves word."""
    over = Event()
    Thread(target=watch, args=(run, stuck_after_s, over), daemon=True).start()
    try:
        yield
    finally:
        over.set()


def watch(run: Store, stuck_after_s: float, over: Event) -> None:
    """Look now and then; who has no place yet, or has a new one, is given time."""
    known: object = None
    since = time.monotonic()
    while not over.wait(LOOK_EVERY_S):
        places: dict[str, PlacementGroup] = {}
        word: dict[str, Any] = {}
        with suppress(Exception):  # GCS, or the store, is away
            places, word = places_of_this_job(), (run / NOTE).read_json() or {}
        found = word, sorted(places)
        if found != known:
            known, since = found, time.monotonic()
        elif places and not word.get("finished") and time.monotonic() - since > stuck_after_s:
            print(f"no worker has said anything for {stuck_after_s:,.0f} s: they are started anew", flush=True)
            for place in places.values():
                remove_placement_group(place)
            since = time.monotonic()


def places_of_this_job() -> dict[str, PlacementGroup]:
    """Its placement groups that have all they asked for, by id."""
    job = ray.get_runtime_context().get_job_id()
    return {
        # An id ends with that of the job that it belongs to.
        name: PlacementGroup(ray.PlacementGroupID(bytes.fromhex(name)))
        for name, group in placement_group_table().items()
        if name.endswith(job) and group["state"] == "CREATED"
    }
