from pathlib import Path

import numpy as np
import pytest
import torch

from embedlib.encoder import Encoder
from tests.golden import vectors as golden


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return golden.make_models(tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize("name", ["teacher", "student", "xlmr_1024"])
def test_vectors_are_golden(models: dict[str, Path], name: str) -> None:
    encoder = Encoder.load(models[name], torch.device("cpu"), torch.float32)
    with np.load(golden.VECTORS) as expected:
        assert set(expected) == {f"{model}/{prompt}" for model in models for prompt in golden.PROMPTS}
        for prompt, prompt_name in golden.PROMPTS.items():
            found = encoder.encode(golden.TEXTS, prompt_name)
            np.testing.assert_allclose(found, expected[f"{name}/{prompt}"], atol=1e-5)
        assert np.abs(expected[f"{name}/none"] - expected[f"{name}/query"]).max() > 0.01
