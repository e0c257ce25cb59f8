"""The critic service on vLLM as a process, with SmolLM2, API keys and a metrics port of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from support.stacks import REPO, stepalign

MODEL = REPO / ".cache" / "smollm2"
START_SECONDS = 400.0
KEYS = ("sk-one", "sk-two", "sk-three")

_CONFIG = """
[critic]
address_file = "{address}"
backend = "vllm"
path = "{model}"
port = 0
api_keys_file = "{keys}"
metrics_port = {metrics_port}
check_known_attempts = false
max_prompt_tokens = 3000
max_batch = 8
{further}

[critic.vllm]
gpu_memory_utilization = 0.2
engine_args = {{ enforce_eager = true }}
"""


class Service:
    def __init__(self, url: str, metrics_url: str, process: subprocess.Popen[bytes]) -> None:
        self.url = url
        self.metrics_url = metrics_url
        self.process = process

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels."""
        total = 0.0
        for line in httpx.get(self.metrics_url, timeout=30).text.splitlines():
            named = line.startswith((f"{name}{{", f"{name} "))
            if named and all(f'{key}="{value}"' in line for key, value in labels.items()):
                total += float(line.rpartition(" ")[2])
        return total

    def wait_until(self, condition: Callable[[], Any], seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, "the service has ended"
            assert time.monotonic() < deadline, "waited too long"
            time.sleep(0.05)


def bearer(key: str = KEYS[0]) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@contextmanager
def vllm_service(folder: Path, further: str) -> Iterator[Service]:
    """The service, ready, with ``further`` lines of its configuration. It does not outlive the test."""
    config, keys, address = folder / "critic.toml", folder / "keys", folder / "critic.url"
    keys.write_text("\n".join(KEYS))
    with socket.create_server(("127.0.0.1", 0)) as free:
        metrics_port = free.getsockname()[1]
    config.write_text(
        _CONFIG.format(address=address, model=MODEL, keys=keys, metrics_port=metrics_port, further=further)
    )
    log = (folder / "log").open("wb")
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
    process = subprocess.Popen(stepalign("critic", str(config)), stdout=log, stderr=log, env=environment)
    try:
        deadline = time.monotonic() + START_SECONDS
        live = False
        while True:
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()[-4000:]
            if address.exists():
                answer = httpx.get(f"{address.read_text()}/health/ready")
                live = live or (answer.status_code == 503 and answer.json()["error"]["code"] == "loading")
                if answer.status_code == 200:
                    break
            time.sleep(0.2)
        assert live, "readiness never said that the engine was loading"
        yield Service(address.read_text(), f"http://127.0.0.1:{metrics_port}/metrics", process)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        log.close()
