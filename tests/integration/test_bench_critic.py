"""The servers of ``make bench-critic``: they start, and their answers are those that its figures count."""

from __future__ import annotations

import pytest

from benchmarks.critic.http import route, service
from benchmarks.critic.overhead import OverheadSettings, measure_overhead
from benchmarks.critic.processes import serving
from benchmarks.wire import Connection

pytestmark = pytest.mark.slow


def test_service_and_route_answer_over_the_engine_of_fixed_latency() -> None:
    with serving("critic", "--seconds", "0.001") as critic, serving("bare", "--seconds", "0.001") as bare:
        settings = OverheadSettings(engine_seconds=0.001, blocks=1, pairs_per_block=2, warm_up_pairs=1)
        of_service, of_bare = measure_overhead(service(critic), route(bare), settings)
        assert min(of_service.engine_p50_ms, of_bare.engine_p50_ms) >= 1.0
        with Connection(critic.host, critic.port) as connection:
            answer = connection.exchange(next(service(critic).requests))
    # The critique of a perfect critic, aligned: its place found by probabilities, its answer the known one.
    assert b'"first_error_step":6' in answer.body and b'"forced":["answer"]' in answer.body
    assert b'"p_wrong":[0.01' in answer.body and b'"prompt_version":"chat-v2"' in answer.body


def test_the_service_answers_before_the_model_server() -> None:
    with serving("model") as model, serving("critic-over", model.url, "aiohttp") as critic:
        target = service(critic)
        with Connection(critic.host, critic.port) as connection:
            answer = connection.exchange(next(target.requests))
    assert answer.status == 200 and all(part in answer.head + answer.body for part in target.expected)
    assert b'"first_error_step":6' in answer.body
