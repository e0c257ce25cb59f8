"""The rate limit of each caller: a token bucket per API key."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from stepalign_critic.errors import RateLimitedError


@dataclass
class _Bucket:
    tokens: float
    filled_at: float


class RateLimiter:
    """A caller may ask for ``per_minute`` critiques at once, and gets one back every ``60 / per_minute`` seconds.

    Each process counts for itself: behind a load balancer over N replicas a caller gets up to N times as many.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._capacity = float(per_minute)
        self._per_second = per_minute / 60.0
        self._clock = clock
        # Callers are the accepted API keys, so there are few.
        self._buckets: dict[str | None, _Bucket] = {}

    def take(self, caller: str | None) -> None:
        """Count one critique. When none is left, raises RateLimitedError with the time to come back."""
        now = self._clock()
        bucket = self._buckets.setdefault(caller, _Bucket(self._capacity, now))
        bucket.tokens = min(self._capacity, bucket.tokens + (now - bucket.filled_at) * self._per_second)
        bucket.filled_at = now
        if bucket.tokens < 1.0:
            wait = (1.0 - bucket.tokens) / self._per_second
            raise RateLimitedError(
                f"this caller may ask for {self._capacity:g} critiques a minute; come back in {wait:.1f} s", wait
            )
        bucket.tokens -= 1.0
