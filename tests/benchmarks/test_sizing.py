"""The tables of docs/operations.md are what the command prints, from numbers that docs/benchmarks.md has."""

import re
from pathlib import Path

import pytest

from benchmarks.sizing import Constants, mine_s, rounded, tables, vectors_s

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_docs_have_what_is_printed() -> None:
    assert tables(Constants.read()) in (DOCS / "operations.md").read_text()


def test_every_constant_stands_in_the_measurements() -> None:
    measurements = " ".join((DOCS / "benchmarks.md").read_text().split())
    for name, measured in Constants.read().measured.items():
        assert measured.words in measurements, name
        numbers = [float(each.replace(",", "")) for each in re.findall(r"\d[\d,]*(?:\.\d+)?", measured.words)]
        assert measured.value in numbers, name


def test_a_machine_that_was_measured_takes_what_was_measured() -> None:
    given = Constants.read()
    gpu = given.machines["H100"]
    assert vectors_s(given, gpu, 63_216) == pytest.approx(1.0)
    # docs/benchmarks.md, "On paper": 49 minutes, 41 hours.
    assert mine_s(given, gpu, 20_000_000) / 60 == pytest.approx(49, rel=0.02)
    assert mine_s(given, gpu, 1_000_000_000) / 3600 == pytest.approx(41, rel=0.02)
    # 45 minutes of training lists, 13 of filling them, 6.7 hours of searching, all on two cores.
    cores = given.machines["CPU"].model_copy(update={"cores": 2})
    assert mine_s(given, cores, 20_000_000) / 60 == pytest.approx(45 + 13 + 6.7 * 60, rel=0.02)


def test_a_gpu_waits_for_a_slow_pipeline() -> None:
    given = Constants.read()
    few = given.machines["H100"].model_copy(update={"cores": 2})
    assert vectors_s(given, few, 18_197) == pytest.approx(1.0)


def test_prices_are_ones_own() -> None:
    assert "| L4 | g6.2xlarge | 8 | 121 | 0.40 |" in tables(Constants.read(["L4=0.4"]))
    with pytest.raises(ValueError, match="--price B200: expected one of CPU, L4"):
        Constants.read(["B200=1"])


def test_two_digits_count() -> None:
    assert [rounded(each) for each in (0.0112, 0.25, 4.7, 33.3, 12_345.6)] == ["0.011", "0.25", "4.7", "33", "12,346"]
