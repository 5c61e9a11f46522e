"""A run of a job as a run of MLflow's: what it is configured with, and its metrics. Imported where one is asked for."""

import json
import os
import re
import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, Self

from embedlib.errors import ConfigError
from embedlib.storage import user_path

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # nobody else is told
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
CREDENTIALS = re.compile(r"(?<=://)[^/@\s]*@")


class MlflowRun:
    """In the shape of TensorBoard's writer; what it is told is sent when it is flushed, and kept while that fails."""

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self.client, self.run_id = client, run_id
        self.waiting: deque[Metric] = deque()

    @classmethod
    def open(cls, uri: str, job: str, mark: str, config: Mapping[str, Any]) -> Self:
        """The run of the work with fingerprint `mark`: the one that was begun before, or a new one.

        Raises ConfigError where MLflow refuses.
        """
        if "://" not in uri:
            uri = user_path(uri)
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow would rather have a database
        try:
            client = MlflowClient(tracking_uri=uri)
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "embedlib")
            known = client.get_experiment_by_name(name)
            experiment = known.experiment_id if known else client.create_experiment(name)
            begun = client.search_runs(
                [experiment], f"tags.`{JOB_TAG}` = '{job}' and tags.`{RUN_TAG}` = '{mark}'", max_results=1
            )
            if begun:
                client.update_run(begun[0].info.run_id, status="RUNNING")
                return cls(client, begun[0].info.run_id)
            run = client.create_run(experiment, tags={JOB_TAG: job, RUN_TAG: mark}, run_name=f"{job}-{mark[:12]}")
            params = [Param(key, value) for key, value in flattened({**config, "fingerprint": mark})]
            for first in range(0, len(params), MOST_PARAMS):
                client.log_batch(run.info.run_id, params=params[first : first + MOST_PARAMS])
        except MlflowException as error:
            raise ConfigError(CREDENTIALS.sub("", f"EMBEDLIB_MLFLOW: {uri}: {error}")) from error
        return cls(client, run.info.run_id)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Take the value of a metric."""
        self.waiting.append(Metric(name, value, round(1000 * time.time()), step))

    def flush(self) -> None:
        """Send what waits; a server that is away is worth a line, and no run."""
        while self.waiting:
            some = [self.waiting.popleft() for _ in range(min(len(self.waiting), MOST_METRICS))]
            try:
                self.client.log_batch(self.run_id, metrics=some)
            except MlflowException as error:
                self.waiting.extendleft(reversed(some))
                print(CREDENTIALS.sub("", f"EMBEDLIB_MLFLOW: metrics wait: {error}"), flush=True)
                return

    def close(self) -> None:
        """The run is finished."""
        self.flush()
        try:
            self.client.set_terminated(self.run_id)
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
