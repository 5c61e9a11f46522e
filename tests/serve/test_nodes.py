"""A node that dies under load costs no answer."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SECONDS = 30


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("trial", range(3))
def test_a_killed_node_costs_no_answer(tiny_encoder: Path, tmp_path: Path, trial: int) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment |= {
        "PYTHONPATH": str(REPOSITORY),
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.proxy:middlewares",  # as cluster/local.sh has it
    }
    command = [sys.executable, "-m", "tests.serve.two_nodes", str(tiny_encoder), str(SECONDS + trial)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=400, stdout=subprocess.PIPE)
    # Ray may write after it.
    counts = json.loads(next(line for line in done.stdout.splitlines() if line.startswith(b'{"asked"')))
    print(counts)
    assert counts["asked"] > 500
    assert counts["more"] < counts["asked"] / 1000
