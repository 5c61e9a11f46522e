"""How many replicas a model needs, by the tokens that wait: a request may be one word or a thousand pages."""

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

QUEUED_TOKENS = "queued_tokens"
"""What replicas report in `record_autoscaling_stats`."""


class QueuedTokens:
    """A policy of Ray Serve, which adds its own bounds, delays and the start from no replica at all."""

    def __init__(self, target_tokens: int) -> None:
        """Enough replicas that about `target_tokens` wait at each."""
        self.target_tokens = target_tokens

    def __call__(self, context: "AutoscalingContext") -> tuple[int, dict[str, Any]]:
        """The replicas wanted, at least one while any request is under way, and no state."""
        waiting = sum((context.aggregated_metrics or {}).get(QUEUED_TOKENS, {}).values())
        return max(math.ceil(waiting / self.target_tokens), context.total_num_requests > 0), {}
