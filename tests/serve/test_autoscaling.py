from types import SimpleNamespace
from typing import Any, cast

import pytest

from serve.autoscaling import QUEUED_TOKENS, QueuedTokens


@pytest.mark.parametrize(
    ("queued", "requests", "wanted"),
    [
        ({}, 0, 0),
        ({}, 3, 1),  # nobody there to count tokens
        ({"a": 0.0}, 1, 1),
        ({"a": 999.0}, 5, 1),
        ({"a": 1001.0}, 1, 2),
        ({"a": 600.0, "b": 600.0, "c": 900.0}, 9, 3),
        ({"a": 0.0, "b": 0.0}, 0, 0),
    ],
)
def test_replicas_follow_the_tokens_that_wait(queued: dict[str, float], requests: int, wanted: int) -> None:
    context = SimpleNamespace(aggregated_metrics={QUEUED_TOKENS: queued}, total_num_requests=requests)
    assert QueuedTokens(1000)(cast("Any", context)) == (wanted, {})


def test_without_reports_requests_count() -> None:
    context = SimpleNamespace(aggregated_metrics=None, total_num_requests=1)
    assert QueuedTokens(1000)(cast("Any", context)) == (1, {})
