"""The first example of docs/critic-clients.md: its request to the shipped configuration gets the response it shows.

A server with OpenAI's protocol stands in for the model: it answers with the text that the example's critic wrote.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.critic_servers import wait_until
from support.upstream import Reply, Upstream, completion, upstream

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SECTION = (ROOT / "docs" / "critic-clients.md").read_text(encoding="utf-8").split("\n## ")[1]
WRITTEN = """\
<step_2>Without the broken ones that is 30 - 4 = 26 eggs.</step_2>
<step_3>Half of them are left: 26 / 2 = 13 eggs.</step_3>
<answer>13</answer>"""


def said_by_the_model(body: dict[str, Any]) -> Reply:
    asked = body["messages"][-1]["content"]
    if not asked.startswith("Step "):
        return Reply(completion(WRITTEN))
    return Reply(completion("wrong" if asked.startswith("Step 2") else "right"))


def shown_part(response: dict[str, Any]) -> dict[str, Any]:
    """As the example's ``jq`` picks it."""
    critique = response["critique"]
    steps = [{key: step[key] for key in ("number", "status", "body")} for step in critique["steps"]]
    return {
        "verdict": critique["verdict"],
        "first_error_step": critique["first_error_step"],
        "steps": steps,
        "context": response["context"],
    }


def test_the_first_example_has_the_response_that_it_shows(tmp_path: Path) -> None:
    request, shown = (json.loads(block) for block in re.findall(r"```json\n(.*?)```", SECTION, re.DOTALL))
    address = tmp_path / "critic.url"
    with upstream(Upstream(said_by_the_model)) as url:
        options = ["--critic.openai.base_url", url, "--critic.port", "0", "--critic.address_file", str(address)]
        command = [sys.executable, "-m", "stepalign.cli", "critic", str(ROOT / "configs" / "critic.toml"), *options]
        with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
            try:
                wait_until(lambda: address.exists() or process.poll() is not None, 60)
                critic = address.read_text(encoding="utf-8")
                wait_until(lambda: httpx.get(f"{critic}/health/ready").status_code == 200)
                response = httpx.post(f"{critic}/v1/critiques", json=request, timeout=30).json()
            finally:
                process.kill()
    assert response["failure"] is None
    assert shown_part(response) == shown
