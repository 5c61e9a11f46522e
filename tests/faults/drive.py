"""A driver as a user starts it, in a process that may be killed: `python -m tests.faults.drive JOB VALUES.json`."""

import jobs  # noqa: F401 isort: skip (sets Ray's authentication mode, which Ray reads when it is imported)

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

# Where each job's configuration and its run are; train and distill say what they do in `main`.
ENTRIES = {
    "corpus": ("BuildConfig", "main"),
    "embed": ("EmbedConfig", "main"),
    "mine": ("MineConfig", "main"),
    "train": ("TrainConfig", "main"),
    "distill": ("DistillConfig", "main"),
    "recipe": ("RecipeConfig", "main"),
}


def main() -> None:
    """Run the job, or the endpoint until this process is ended."""
    name, values = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    if name == "serve":
        serve(values)
        return
    config, run = ENTRIES[name]
    job = import_module(f"jobs.{name}")
    getattr(job, run)(getattr(job, config).model_validate(values))


def serve(values: dict[str, Any]) -> None:
    """Deploy the endpoint; it stays when this process goes."""
    import ray
    from ray import serve

    from jobs.runtime import quiet
    from serve.app import build_app

    quiet()
    ray.init(logging_level="WARNING", log_to_driver=False, namespace="serve")
    serve.start(proxy_location="HeadOnly", http_options={"host": values["host"], "port": values["port"]})
    serve.run(build_app(values["application"]))


if __name__ == "__main__":
    main()
