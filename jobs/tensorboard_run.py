"""A run of a job as a run of TensorBoard's. Imported where one is asked for."""

import time
from collections import deque

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import directory_check
from tensorboardX.summary import scalar

from embedlib.errors import ConfigError


class TensorBoardRun:
    """Scalars in an event file, of whoever flushes it.

    tensorboardX's own writer has a thread and a queue: on a full disk the one dies, and the other, once it is full,
    holds up the run for ever.
    """

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.file: EventsWriter | None = None
        self.waiting: deque[Event] = deque()

    def open(self) -> None:
        """Begin the file; ConfigError where it cannot be."""
        try:
            self.begin()
        except OSError as error:
            raise ConfigError(f"EMBEDLIB_TENSORBOARD: {self.directory}: cannot be written: {error}") from error

    def begin(self) -> EventsWriter:
        """The file, begun if it is not."""
        if self.file is None:
            directory_check(self.directory)
            self.file = EventsWriter(f"{self.directory}/events")
        return self.file

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Take the value of a metric."""
        self.waiting.append(Event(wall_time=time.time(), step=step, summary=scalar(name, value)))

    def flush(self) -> None:
        """Write what waits."""
        if not self.waiting:
            return
        file = self.begin()
        while self.waiting:
            file.write_event(self.waiting.popleft())
        file.flush()

    def close(self) -> None:
        """The run is finished."""
        self.flush()
        self.begin().close()
