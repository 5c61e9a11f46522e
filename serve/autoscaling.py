"""How many replicas a model needs, by the tokens that wait: a request may be one word or a thousand pages."""

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

QUEUED_TOKENS, BUSY = "queued_tokens", "busy"
"""What replicas report in `record_autoscaling_stats`: tokens that wait, and the share of the time that they compute."""
TARGET_BUSY = 0.8


class QueuedTokens:
    """A policy of Ray Serve, which adds its own bounds, delays and the start from no replica at all."""

    def __init__(self, target_tokens: int) -> None:
        """Enough replicas that about `target_tokens` wait at each."""
        self.target_tokens = target_tokens

    def __call__(self, context: "AutoscalingContext") -> tuple[int, dict[str, Any]]:
        """The replicas wanted, at least one while any request is under way, and no state.

        Those that keep up have no queue and are needed all the same: nobody leaves while the others would be too busy.
        """
        metrics = context.aggregated_metrics or {}
        waiting, busy = (sum(metrics.get(name, {}).values()) for name in (QUEUED_TOKENS, BUSY))
        needed = math.ceil(waiting / self.target_tokens)
        kept = min(context.current_num_replicas, math.ceil(busy / TARGET_BUSY))
        return max(needed, kept, context.total_num_requests > 0), {}
