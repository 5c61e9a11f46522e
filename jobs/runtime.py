"""What every job needs of Ray and of the terminal: a cluster to run on, quiet logs, errors in one line."""

import json
import logging
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray

from embedlib import errors
from embedlib.errors import EmbedlibError

# A resumed Ray Data plan hangs where Ray counts two CPUs or fewer (Ray 2.60), so a local cluster counts at least four.
MIN_LOCAL_CPUS = 4
MAX_CPU_PROCESSES = 8
# Few, since each takes turns at Python's lock, and more than one, since every process has a model and a tokenizer.
THREADS_AN_ENCODER = 4
SOME_CPU = 0.001
"""What an actor asks for that takes no core from others: it does not come to lie on a head that offers none."""


def connect() -> None:
    """Join the cluster this job was submitted to, or start a local one with token authentication."""
    quiet()
    join()
    if torch := sys.modules.get("torch"):
        # Ray leaves a submitted job one thread, as it does a worker that asked for no more.
        torch.set_num_threads(os.cpu_count() or 1)


def join() -> None:
    """Be part of a cluster, of one that is started for it where there is none."""
    if ray.is_initialized():
        return
    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level=logging.WARNING)
        return
    require_token()
    # On a machine of few cores a worker of low priority waits for every small task of Ray's own.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # Else Ray starts a process a core ahead of all work; those that get none hold memory until the job ends.
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    cores = max(MIN_LOCAL_CPUS, os.cpu_count() or 1)
    ray.init(
        "local",
        num_cpus=cores,
        include_dashboard=False,
        logging_level=logging.WARNING,
        runtime_env={"worker_process_setup_hook": quiet_cleaner},
    )


def quiet_cleaner() -> None:
    """Have Ray Train's cleaner not tell once a second of a training that a local cluster has no dashboard to ask."""
    logging.getLogger("ray.train.v2._internal.execution.controller.placement_group_cleaner").setLevel(logging.ERROR)


def require_token() -> None:
    """Make the token of the authentication that `jobs` switched on, on first use, readable by its owner alone."""
    if "RAY_AUTH_TOKEN" in os.environ:
        return
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", Path.home() / ".ray" / "auth_token"))
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
            file.write(secrets.token_hex(32))


def quiet() -> None:
    """Keep library chatter out of the log of a job or of its workers; errors stay."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    import ray.data

    if "torch" in sys.modules:  # a job without a model is to do without what models need: it is most of its start
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # jobs print their own progress
    for name in ("ray.data", "ray.train", "ray.tune", "sentence_transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)


def num_gpus() -> int:
    """GPUs of the cluster; where it has none yet, those that its autoscaler may start."""
    return present_gpus() or autoscaled("GPU")


def present_gpus() -> int:
    """GPUs that the cluster has now."""
    return int(ray.cluster_resources().get("GPU", 0))


def working_nodes() -> int:
    """Nodes that are there now and give CPUs to work, at least the one to come: neither the lost nor a head without."""
    return max(1, sum(bool(node["Alive"] and node["Resources"].get("CPU")) for node in ray.nodes()))


def autoscaled(resource: str) -> int:
    """How much of a resource the autoscaler's configuration allows all nodes together; 0 without one."""
    from ray._private.state import state  # Ray Train asks there, too: nothing public tells

    return int((state.get_max_resources_from_cluster_config() or {}).get(resource, 0))


def cpu_processes() -> int:
    """How many processes the CPUs of one node feed where Python, not a model, has most to do: one a core."""
    return min(os.cpu_count() or 1, MAX_CPU_PROCESSES)


def all_cpu_processes() -> int:
    """How many such processes the CPUs of all nodes feed."""
    return working_nodes() * cpu_processes()


def encoder_processes() -> int:
    """How many processes the CPUs of one node feed that each hold a model and compute it in several threads."""
    return max(1, min((os.cpu_count() or 1) // THREADS_AN_ENCODER, MAX_CPU_PROCESSES))


def artifacts_directory() -> Path:
    """Where jobs keep their output: $EMBEDLIB_ARTIFACTS, else `artifacts` where the job was started."""
    return Path(os.environ.get("EMBEDLIB_ARTIFACTS", "artifacts")).absolute()


@contextmanager
def own_errors() -> Iterator[None]:
    """Raise the embedlib error that a worker ended with as what it is, out of what Ray wraps round it."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, EmbedlibError):
            cause = getattr(cause, "cause", None) or cause.__cause__
        if cause is None or cause is error:
            raise
        # Its own type and words: Ray's subclass of it prints the worker's whole traceback.
        kind = next(base for base in type(cause).__mro__ if base.__module__ == EmbedlibError.__module__)
        raise kind(str(cause.args[0] if cause.args else cause)) from error


def as_row(error: EmbedlibError) -> str:
    """An error as a value of a row: raised in a worker of Ray Data, it would come back as Ray's own, or be retried."""
    return json.dumps({"kind": type(error).__name__, "message": str(error)})


def error_of(row: str) -> EmbedlibError:
    """The error that `as_row` made a value of."""
    problem = json.loads(row)
    error: EmbedlibError = getattr(errors, problem["kind"])(problem["message"])
    return error


def format_seconds(seconds: float) -> str:
    """`75.2` → `1:15`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
