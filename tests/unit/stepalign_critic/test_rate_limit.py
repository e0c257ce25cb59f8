from __future__ import annotations

import pytest

from stepalign_critic.errors import RateLimitedError
from stepalign_critic.http.rate_limit import RateLimiter


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_caller_gets_its_share_back_with_time_and_never_over_a_minutes() -> None:
    clock = Clock()
    limiter = RateLimiter(6, clock)
    for _ in range(6):
        limiter.take("a")
    with pytest.raises(RateLimitedError, match="6 critiques a minute") as refused:
        limiter.take("a")
    assert refused.value.retry_after == pytest.approx(10.0)
    clock.now += refused.value.retry_after
    limiter.take("a")
    with pytest.raises(RateLimitedError):
        limiter.take("a")
    clock.now += 3600
    for _ in range(6):
        limiter.take("a")
    with pytest.raises(RateLimitedError):
        limiter.take("a")


def test_callers_do_not_use_up_each_others_share() -> None:
    limiter = RateLimiter(1, Clock())
    limiter.take("a")
    limiter.take("b")
    limiter.take(None)
    for caller in ("a", "b", None):
        with pytest.raises(RateLimitedError):
            limiter.take(caller)
