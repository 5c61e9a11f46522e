from pathlib import Path

import pyarrow.parquet as pq
import pytest

from benchmarks import embed_job
from benchmarks.embed_job import Growth


def test_rows_are_as_many_as_asked_for_and_distinct(tmp_path: Path) -> None:
    embed_job.write_rows(tmp_path / "rows.parquet", ["a", "b", "c"], 10)
    texts = pq.read_table(tmp_path / "rows.parquet")["text"].to_pylist()
    assert texts[:5] == ["a", "b", "c", "a 1", "b 1"]
    assert len(set(texts)) == 10


def test_the_fit_finds_rate_and_start() -> None:
    growth = [Growth(rows, 3.0 + rows / 1000, 1) for rows in (1000, 5000, 20_000)]
    fit = embed_job.linear_fit(growth)
    assert fit == {"rows_per_s": pytest.approx(1000), "start_s": pytest.approx(3), "r2": pytest.approx(1)}
    bent = [Growth(rows, seconds, 1) for rows, seconds in ((1, 1.0), (10, 9.0), (100, 2.0))]
    assert embed_job.linear_fit(bent)["r2"] < 0.99


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    growth = [Growth(1000, 1.0, 2**30), Growth(2000, 2.0, 2**30)]
    embed_job.plot_growth(growth, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
