"""A whole recipe while nodes go and come: nothing is lost, and it ends with what an undisturbed run ends with."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from embedlib.evaluation.evaluation_report import read_evaluation
from tests.faults.conftest import REPOSITORY
from tests.faults.work import lost_rows, lost_shards, lost_training
from tests.jobs.test_runs import changed, whole_road

EVERY_S = 30.0
POINTS = 1.0
"""What scores may differ by: a vector that is otherwise in its last digits may come to lie on another side."""


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_recipe_goes_on_while_nodes_are_killed_and_join(tiny_encoder: Path, tmp_path: Path) -> None:
    workers = {"checkpoint_every": 5, "validate_every": 50, "max_failures": -1}
    patient = {"stages": {name: {"values": {"workers": workers}} for name in ("distilled", "contrasted")}}
    recipe = changed(whole_road(tmp_path, tiny_encoder), patient)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_ADDRESS")}
    calm, disturbed = tmp_path / "calm", tmp_path / "disturbed"

    (tmp_path / "calm.json").write_text(json.dumps(recipe | {"output": str(calm)}))
    command = [sys.executable, "-m", "tests.faults.drive", "recipe", str(tmp_path / "calm.json")]
    subprocess.run(command, cwd=REPOSITORY, env=environment, check=True)

    values = recipe | {"output": str(disturbed)}
    churn = {"job": "recipe", "values": values, "every_s": EVERY_S, "seed": 0, "folder": str(tmp_path)}
    (tmp_path / "churn.json").write_text(json.dumps(churn))
    command = [sys.executable, "-m", "tests.faults.churn", str(tmp_path / "churn.json")]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    # Ray, too, prints to where it is told.
    (line,) = [line for line in done.stdout.splitlines() if line.startswith('{"killed"')]
    told = json.loads(line)
    print(told)
    assert told["returncode"] == 0, (tmp_path / "driver.log").read_text()[-4000:]
    assert len(told["killed"]) >= 3

    assert lost_shards(calm / "corpus", disturbed / "corpus") == 0
    assert lost_training("student")(calm / "distilled", disturbed / "distilled") == 0
    assert lost_rows(calm / "mined", disturbed / "mined") == 0
    assert lost_training("model")(calm / "contrasted", disturbed / "contrasted") == 0
    scores = []
    for output in (calm, disturbed):
        found = read_evaluation(output / "scored")
        assert found is not None
        assert found.failures == []
        scores.append({(score.model, score.task, score.subset): score.value for score in found.scores})
    assert scores[0].keys() == scores[1].keys()
    np.testing.assert_allclose([scores[1][key] for key in scores[0]], [*scores[0].values()], atol=POINTS)
