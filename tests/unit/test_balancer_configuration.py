"""Figures in the load balancer's configuration that must fit those elsewhere, or it fails silently."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from stepalign_critic.process import _LAST_ANSWERS_SECONDS, _LAST_THREADS_SECONDS
from stepalign_run.config import load_config, load_critic_config

ROOT = Path(__file__).parents[2]
CRITICS = {"critic.toml", "qwen.toml"}
# Critics alone wait for nobody.
RUNS = [path for path in (ROOT / "configs").glob("*.toml") if path.name not in CRITICS]
HAPROXY = (ROOT / "services" / "lb" / "haproxy.cfg").read_text(encoding="utf-8")
COMPOSE = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600}
HEADERS_BYTES = 16_384


def number(directive: str) -> int:
    (found,) = re.findall(rf"^ +{re.escape(directive)} (\d+)$", HAPROXY, re.MULTILINE)
    return int(found)


def seconds(directive: str) -> float:
    ((amount, unit),) = re.findall(rf"^ +{re.escape(directive)} (\d+)(ms|s|m|h)$", HAPROXY, re.MULTILINE)
    return int(amount) * SECONDS[unit]


def test_a_request_with_the_largest_body_fits_the_buffer_for_repeats() -> None:
    limits = {load_critic_config(path, [], {}).critic.max_body_bytes for path in (ROOT / "configs").glob("*.toml")}
    assert number("tune.bufsize") >= max(limits) + HEADERS_BYTES
    assert re.search(r"^ +option http-buffer-request$", HAPROXY, re.MULTILINE)


def test_the_buffers_of_all_connections_fit_the_memory() -> None:
    (gibibytes,) = re.findall(r"\$\{LB_MEMORY:-(\d+)G\}", COMPOSE)
    whole, frontend = (int(found) for found in re.findall(r"^ +maxconn (\d+)$", HAPROXY, re.MULTILINE))
    assert whole * number("tune.bufsize") <= 0.75 * int(gibibytes) * 2**30
    assert frontend < whole


def test_the_balancer_waits_longer_than_any_shipped_configuration() -> None:
    longest = max(load_config(path, [], {}).critic.timeout_seconds for path in RUNS)
    assert seconds("timeout server") > longest


def test_the_balancer_looks_away_within_the_drain_and_stops_in_its_grace() -> None:
    (drain,) = re.findall(r"\$\{DRAIN_GRACE_SECONDS:-(\d+)\}", COMPOSE)
    (interval, fast), *_ = re.findall(r" inter (\d+)s fastinter (\d+)ms .*fall 2\b", HAPROXY)
    slowest = int(interval) + int(fast) / 1000 + 2 * seconds("timeout check")
    assert slowest < int(drain)
    assert seconds("hard-stop-after") < 60


@pytest.mark.parametrize(("shipped", "index"), [("lab.toml", 0), ("paper.toml", 1)])
def test_a_critic_may_finish_what_it_has_before_compose_kills_it(shipped: str, index: int) -> None:
    (drain,) = re.findall(r"\$\{DRAIN_GRACE_SECONDS:-(\d+)\}", COMPOSE)
    grace = re.findall(r"stop_grace_period: \$\{STOP_GRACE:-(\d+)s\}", COMPOSE)
    assert len(grace) == 2
    finish = load_critic_config(ROOT / "configs" / shipped, [], {}).critic.finish_seconds
    assert int(drain) + finish + _LAST_ANSWERS_SECONDS + _LAST_THREADS_SECONDS < int(grace[index])


def test_a_request_is_tried_for_longer_than_a_new_replica_counts_as_up() -> None:
    (interval, fast), *_ = re.findall(r" inter (\d+)s fastinter (\d+)ms .*fall 2\b", HAPROXY)
    waits = number("retries") - number("retries") // number("option redispatch")
    assert waits * seconds("timeout connect") > int(interval) + int(fast) / 1000


def test_the_critic_keeps_a_connection_longer_than_the_balancer_and_has_one_for_each_of_its() -> None:
    whole = max(int(found) for found in re.findall(r"^ +maxconn (\d+)$", HAPROXY, re.MULTILINE))
    for path in (ROOT / "configs").glob("*.toml"):
        critic = load_critic_config(path, [], {}).critic
        assert critic.keep_alive_seconds > seconds("timeout http-keep-alive")
        assert critic.max_connections > whole
