import numpy as np
import pytest

from benchmarks import distill
from benchmarks.distill import Mark, Run, Settings

SETTINGS = Settings(batch_size=10, device_batch=10, num_steps=4, warmup_steps=2, num_runs=1)


def marks(*seconds: float) -> list[Mark]:
    return [Mark(at, 100 * number) for number, at in enumerate(seconds)]


def test_a_rate_leaves_the_first_steps_out():
    assert distill.samples_per_s(marks(50.0, 60.0, 62.0, 64.0), SETTINGS) == pytest.approx(5.0)
    assert distill.page_faults_a_step(marks(50.0, 60.0, 62.0, 64.0), SETTINGS) == 100


def test_ratios_divide_medians():
    rates = {variant.name: [1.0, 2.0, 30.0] for variant in distill.VARIANTS}
    rates["embedlib"] = [8.0, 5.0, 6.0]
    ratios = distill.ratios_of(rates)
    assert ratios["distill_vs_st_trainer"] == 3.0
    assert ratios["distill_fp32_vs_st_trainer"] == 1.0
    assert set(ratios) == set(distill.RATIOS)


def test_every_ratio_names_variants_that_run():
    names = {variant.name for variant in distill.VARIANTS}
    assert {name for pair in distill.RATIOS.values() for name in pair} <= names
    assert {variant.trainer for variant in distill.VARIANTS} == set(distill.RUNNERS)


def test_padded_tokens_are_rows_times_the_longest():
    lengths = np.array([5, 1, 2, 2])
    assert distill.padded_tokens(lengths, [np.array([0, 1]), np.array([2, 3])]) == 14


def test_only_the_trainer_pads():
    settings = Settings(batch_size=200, device_batch=100, num_steps=1, warmup_steps=0, num_runs=1)
    padding = distill.padding_by_trainer(np.arange(1, 201), settings)
    assert padding["embedlib"] == 100.5
    assert 150 < padding["sentence-transformers"] <= 200


def test_both_sides_see_every_sample_once():
    assert sorted(np.concatenate(distill.sample_order(SETTINGS))) == list(range(40))


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        (["aten::addmm", "aten::linear"], "matmul, forward"),
        (["aten::mm", "AddmmBackward0", "autograd::engine::evaluate_function: AddmmBackward0"], "matmul, backward"),
        (["aten::bmm", "aten::matmul"], "attention"),
        (["aten::_softmax"], "attention"),
        (["aten::fill_", "aten::zeros", "EmbeddingBackward0"], "embedding gradient"),
        (["aten::_fused_adamw_", "Optimizer.step#AdamW.step"], "optimiser"),
        (["aten::native_layer_norm_backward"], "LayerNorm and GELU"),
        (["aten::copy_", "aten::_to_copy"], "copies and casts"),
        (["aten::add"], "other"),
    ],
)
def test_kinds_of_work(path: list[str], kind: str):
    assert distill.kind_of_work(path) == kind


def test_learning_is_a_last_quarter_below_the_first():
    assert distill.falls([4.0, 9.0, 9.0, 3.0])
    assert not distill.falls([4.0, 1.0, 1.0, 4.0])


def test_a_run_is_described_with_every_step():
    described = distill.describe_run(Run("embedlib", marks(0.0, 1.0, 3.0, 5.0), [2.0, 1.0, 1.0, 1.0]), SETTINGS)
    assert described["step_s"] == [1.0, 2.0, 2.0]
    assert described["samples_per_s"] == pytest.approx(5.0)


def test_batches_that_do_not_divide_are_refused():
    with pytest.raises(SystemExit, match="--device-batch 100"):
        distill.settings_of(distill.parse_arguments(["--device-batch", "100"]))


def test_quick_is_one_run():
    settings = distill.settings_of(distill.parse_arguments(["--quick"]))
    assert settings.num_runs == 1
    assert settings.num_samples == settings.batch_size * settings.num_steps
