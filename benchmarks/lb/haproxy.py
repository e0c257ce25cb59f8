"""The balancer's state, from its own metrics."""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from benchmarks.errors import BenchError
from benchmarks.wire import fetch

_PORT = 8405
_UP = "haproxy_backend_agg_server_status"
_RETRIES = "haproxy_backend_retry_warnings_total"
_REDISPATCHES = "haproxy_backend_redispatch_warnings_total"


@dataclass(frozen=True)
class BackendState:
    """Replicas that get requests, and the repeats since the balancer started."""

    up: int
    retries: int
    redispatches: int


def backend_state(address: str) -> BackendState:
    """The state of the balancer's backend now."""
    # Only these: all of them are 180 kB of text, and reading them would slow the measured requests.
    text = _metrics(address, f"scope=backend&metrics={_UP},{_RETRIES},{_REDISPATCHES}")
    samples = {
        sample.name: int(sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.labels.get("state", "UP") == "UP"
    }
    return BackendState(samples[_UP], samples[_RETRIES], samples[_REDISPATCHES])


def version(address: str) -> str:
    """The version of the balancer."""
    for family in text_string_to_metric_families(_metrics(address, "scope=global")):
        for sample in family.samples:
            if sample.name == "haproxy_process_build_info":
                return sample.labels["version"]
    raise BenchError("the balancer does not tell its version")


def _metrics(address: str, query: str) -> str:
    answer = fetch(address, f"/metrics?{query}", port=_PORT)
    if answer.status != 200:
        raise BenchError(f"the balancer's metrics were answered with {answer.status}")
    return answer.body.decode()
