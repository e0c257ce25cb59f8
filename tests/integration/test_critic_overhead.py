"""The service beside a bare FastAPI route over the same engine: a short form of ``make bench-critic``.

The bound is wide, for machines with other work: it finds a service that has become several times slower.
"""

from __future__ import annotations

import pytest

from benchmarks.critic.http import measure_throughput
from benchmarks.critic.load import LoadSettings

pytestmark = pytest.mark.slow

LEAST_OF_A_BARE_ROUTE = 0.1


def test_the_service_carries_a_fair_share_of_what_a_bare_route_carries() -> None:
    rounds = measure_throughput(LoadSettings(connections=32, rounds=3, seconds=1.0, warm_up_seconds=0.5))
    assert rounds["service"].ratio_to(rounds["bare"]) > LEAST_OF_A_BARE_ROUTE
    assert min(load.requests for load in rounds["service"].loads) > 32
