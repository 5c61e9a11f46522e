"""A run of a job as a run of MLflow's: what it is configured with, and its metrics. Imported where one is asked for."""

import json
import os
import re
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from embedlib.errors import ConfigError
from embedlib.storage import user_path
from jobs.metrics import CREDENTIALS

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # nobody else is told
# MLflow would try for a quarter of an hour, while a run has word to leave and an end to come to.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
try:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param
    from mlflow.exceptions import MlflowException
except ImportError as error:
    raise ConfigError("EMBEDLIB_MLFLOW: MLflow is not installed; expected: pip install 'embedlib[mlflow]'") from error

JOB_TAG, RUN_TAG = "embedlib.job", "embedlib.run"
# What the server takes at once.
MOST_METRICS, MOST_PARAMS = 1000, 100
ODD = re.compile(r"[^\w./ -]")


@contextmanager
def refusals(uri: str) -> Iterator[None]:
    """ConfigError where MLflow refuses; its own error, whose text may have a password, stays behind."""
    try:
        yield
    except MlflowException as error:
        raise ConfigError(CREDENTIALS.sub("", f"EMBEDLIB_MLFLOW: {uri}: {error}")) from None


def experiment_at(uri: str) -> tuple[MlflowClient, str]:
    """Who speaks to MLflow, and the id of the experiment that runs are in, which is made if there is none."""
    if "://" not in uri:
        uri = user_path(uri)
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow would rather have a database
    client = MlflowClient(tracking_uri=uri)
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "embedlib")
    known = client.get_experiment_by_name(name)
    return client, known.experiment_id if known else client.create_experiment(name)


class MlflowRun:
    """The run of the work with fingerprint `mark`: the one that was begun before, or a new one.

    What it is told is sent when it is flushed, and kept while that fails.
    """

    def __init__(self, uri: str, job: str, mark: str, config: Mapping[str, Any]) -> None:
        self.uri, self.job, self.mark, self.config = uri, job, mark, config
        self.begun: tuple[MlflowClient, str] | None = None
        self.waiting: deque[Metric] = deque()

    def open(self) -> None:
        """Begin it; ConfigError where MLflow refuses."""
        with refusals(self.uri):
            self.begin()

    def begin(self) -> tuple[MlflowClient, str]:
        """Who speaks to MLflow, and the run's id; it is begun if it is not."""
        if self.begun:
            return self.begun
        client, experiment = experiment_at(self.uri)
        found = client.search_runs(
            [experiment], f"tags.`{JOB_TAG}` = '{self.job}' and tags.`{RUN_TAG}` = '{self.mark}'", max_results=1
        )
        if found:
            run_id = found[0].info.run_id
            client.update_run(run_id, status="RUNNING")
        else:
            tags, name = {JOB_TAG: self.job, RUN_TAG: self.mark}, f"{self.job}-{self.mark[:12]}"
            run_id = client.create_run(experiment, tags=tags, run_name=name).info.run_id
            params = [Param(key, value) for key, value in flattened({**self.config, "fingerprint": self.mark})]
            for first in range(0, len(params), MOST_PARAMS):
                client.log_batch(run_id, params=params[first : first + MOST_PARAMS])
        self.begun = client, run_id
        return self.begun

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Take the value of a metric."""
        self.waiting.append(Metric(name, value, round(1000 * time.time()), step))

    def flush(self) -> None:
        """Send what waits; a server that is away is worth a line, and no run."""
        while self.waiting:
            some = [self.waiting.popleft() for _ in range(min(len(self.waiting), MOST_METRICS))]
            try:
                client, run_id = self.begin()
                client.log_batch(run_id, metrics=some)
            except MlflowException as error:
                self.waiting.extendleft(reversed(some))
                print(CREDENTIALS.sub("", f"EMBEDLIB_MLFLOW: metrics wait: {error}"), flush=True)
                return

    def close(self) -> None:
        """The run is finished."""
        self.flush()
        try:
            client, run_id = self.begin()
            client.set_terminated(run_id)
        except MlflowException as error:
            print(CREDENTIALS.sub("", f"EMBEDLIB_MLFLOW: the run could not be ended: {error}"), flush=True)


def flattened(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """Every value by its dotted key, as on the command line; credentials in URIs are left out."""
    for name, value in values.items():
        key = before + ODD.sub("_", name)
        if isinstance(value, Mapping) and value:
            yield from flattened(value, f"{key}.")
        else:
            written = value if isinstance(value, str) else json.dumps(value)
            yield key, CREDENTIALS.sub("", written)
