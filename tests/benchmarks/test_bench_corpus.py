"""The rows of the benchmark are where it says they are."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from benchmarks import corpus

TEXTS = corpus.Texts(["one text", "another"], ["en", "en"], ["asked here"], ["en"])


def test_injected_rows_are_at_known_places(tmp_path: Path) -> None:
    rows = np.arange(5000)
    is_copy, is_evaluation, is_short, origin = corpus.place_of(rows)
    assert (is_copy.sum(), is_evaluation.sum(), is_short.sum()) == (400, 25, 15)
    assert (origin[is_copy] < rows[is_copy]).all()
    assert not (is_copy | is_evaluation | is_short)[origin[is_copy]].any()
    texts = pq.read_table(corpus.write_rows(tmp_path / "rows", TEXTS, 5000))["text"].to_pylist()
    plain = ~(is_copy | is_evaluation | is_short)
    assert len({texts[row] for row in rows[plain]}) == plain.sum()
    assert all(texts[row] == texts[origin[row]] for row in rows[is_copy])
    assert {texts[row] for row in rows[is_evaluation]} == {"ASKED HERE !"}
    assert {texts[row] for row in rows[is_short]} == {"ok"}


def test_a_line_is_fitted() -> None:
    growth = [corpus.Growth(rows, 2 + rows / 1000, 1, rows) for rows in (1000, 2000, 5000)]
    fit = corpus.linear_fit(growth)
    assert round(fit["rows_per_s"]) == 1000
    assert round(fit["start_s"], 6) == 2
    assert fit["r2"] > 0.999999
    assert corpus.sizes("10,20") == (10, 20)
