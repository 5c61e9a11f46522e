from types import SimpleNamespace
from typing import Any, cast

import pytest

from serve.autoscaling import BUSY, QUEUED_TOKENS, QueuedTokens


@pytest.mark.parametrize(
    ("queued", "busy", "requests", "wanted"),
    [
        ([], [], 0, 0),
        ([], [], 3, 1),  # nobody there to count tokens
        ([0.0], [0.1], 1, 1),
        ([999.0], [1.0], 5, 1),
        ([1001.0], [1.0], 1, 2),
        ([600.0, 600.0, 900.0], [1.0, 1.0, 1.0], 9, 3),
        ([0.0, 0.0], [0.0, 0.0], 0, 0),
        ([10.0, 10.0, 10.0], [0.7, 0.7, 0.7], 3, 3),  # they keep up because there are three
        ([10.0, 10.0, 10.0], [0.5, 0.5, 0.5], 3, 2),
        ([0.0], [1.0], 1, 1),  # a queue alone makes more
    ],
)
def test_replicas_follow_the_tokens_that_wait(
    queued: list[float], busy: list[float], requests: int, wanted: int
) -> None:
    metrics = {QUEUED_TOKENS: dict(enumerate(queued)), BUSY: dict(enumerate(busy))}
    context = SimpleNamespace(aggregated_metrics=metrics, total_num_requests=requests, current_num_replicas=len(queued))
    assert QueuedTokens(1000)(cast("Any", context)) == (wanted, {})


def test_without_reports_requests_count() -> None:
    context = SimpleNamespace(aggregated_metrics=None, total_num_requests=1, current_num_replicas=0)
    assert QueuedTokens(1000)(cast("Any", context)) == (1, {})
