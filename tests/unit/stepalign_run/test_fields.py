"""What travels is checked where it is configured: a configuration that loads can be run, and its run be reported."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from stepalign.errors import ConfigError, ProblemFileError
from stepalign.types import Problem
from stepalign_run.config import Config, load_config
from stepalign_run.queue import open_queue
from stepalign_run.queue.codec import decode, encode
from stepalign_run.redis.connection import run_key
from stepalign_run.rollout import Rollout, SamplingParameters
from stepalign_run.training_problems import load_training_problems

TOML = """
[model]
path = "m"
[data]
train = "t.jsonl"
[critic]
backend = "program"
checker = "lab"
"""


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(TOML)
    return path


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--run.name", "ü"], "command line: run.name: 'ü' is no name: take ASCII letters, digits and _ . -"),
        (["--run.name", ".."], "run.name: '..' is no name"),
        (["--run.name", "."], "run.name: '.' is no name"),
        (["--run.name", "a b"], "run.name: 'a b' is no name"),
        (["--run.name", "a\n"], r"run.name: 'a\n' is no name"),
        (["--run.name", "-a"], "run.name"),
        (["--run.name", ""], "run.name"),
        (["--run.name", "a" * 101], "has 101 characters; take 100 at most"),
        (["--run.name", "\udcff"], r"run.name: '\udcff' is no name"),
        (["--run.arm", "my arm.toml"], "run.arm: 'my arm' is no name"),
        (["--run.arm", "ü"], "run.arm: 'ü' is no name"),
        (["--run.arm", "base.toml"], "an arm cannot be called 'base'"),
        (["--run.arm", "\udcff/a.toml"], r"run.arm: '\udcff/a.toml' is no UTF-8; rename it"),
        (["--run.arm", "a" * 81 + ".toml"], "has 81 characters; take 80 at most"),
        (["--run.dir", "\udcff"], r"run.dir: '\udcff' is no UTF-8; rename it"),
        (["--data.train", "\udcff.jsonl"], r"data.train: '/"),
        (["--data.grader", "\udcff"], "data.grader"),
        (["--trainer.lora.target_modules", "\udcff"], "trainer.lora.target_modules"),
        (["--model.chat_template_options", '{"a": NaN}'], "model.chat_template_options: a: no finite number (nan)"),
        (["--model.chat_template_options", '{"a": "\\ud800"}'], "model.chat_template_options: a: there is half of a"),
        (["--model.chat_template_options", "tokenize=true"], "tokenize: the prompts' rendering sets it; remove it"),
        (["--critic.chat_template_options", "messages=[]"], "messages: the prompts' rendering sets it; remove it"),
        (["--model.teacher_chat_template_options", "messages=1"], "messages: the prompts' rendering sets it"),
        (["--trainer.steps", "2147483648"], "trainer.steps"),
        (["--trainer.max_grad_norm", "inf"], "trainer.max_grad_norm: Input should be a finite number"),
        (["--trainer.lora.alpha", "inf"], "trainer.lora.alpha: Input should be a finite number"),
        (["--queue.claim_idle_seconds", "inf"], "queue.claim_idle_seconds: Input should be a finite number"),
        (["--queue.capacity", "9" * 30], "queue.capacity: a whole number of more than 64 bits"),
        (["--queue.max_entry_bytes", str(2**30)], "queue.max_entry_bytes"),
        (["--solver.max_new_tokens", "1048577"], "solver.max_new_tokens"),
        (["--evaluation.max_new_tokens", "1048577"], "evaluation.max_new_tokens"),
        (["--solver.top_k", "2147483648"], "solver.top_k"),
        (["--run.seed", "2147483648"], "run.seed"),
    ],
)
def test_what_cannot_travel_is_refused_by_its_key(toml: Path, options: list[str], said: str) -> None:
    absolute = [word if word != "\udcff.jsonl" else f"/{word}" for word in options]
    with pytest.raises(ConfigError) as refused:
        load_config(toml, absolute, {})
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("t.jsonl", r"a\u0000.jsonl", "data.train: a path cannot hold the character NUL"),
        ("[model]", '[run]\narm = "a\\u0000.toml"\n[model]', "run.arm: 'a\\x00' is no name"),
        ("[data]", "chat_template_options = {d = 2026-01-01}\n[data]", "d: JSON has no date; write it as text"),
        ("[data]", "chat_template_options = {n = inf}\n[data]", "n: no finite number (inf)"),
    ],
)
def test_what_only_a_file_can_hold_is_refused_too(toml: Path, old: str, new: str, said: str) -> None:
    toml.write_text(TOML.replace(old, new))
    with pytest.raises(ConfigError) as refused:
        load_config(toml, [], {})
    assert said in str(refused.value)


def test_a_link_to_itself_is_no_traceback(toml: Path) -> None:
    (toml.parent / "t.jsonl").symlink_to("t.jsonl")
    with pytest.raises(ProblemFileError, match="cannot be read"):
        load_training_problems(load_config(toml, [], {}))


def rollout_of(config: Config, problem: Problem, version: int) -> Rollout:
    """As the solver makes it."""
    return Rollout(
        run_id=config.run.name,
        rollout_id=f"v{version:06d}/{problem.id}/{2**31 - 1}",
        group_id=f"v{version:06d}/{problem.id}/{2**31 - 1}",
        problem=problem,
        policy_version=version,
        prompt_token_ids=[0],
        completion_token_ids=[2**31 - 1],
        text="",
        finish_reason="length",
        sampling=config.solver.parameters(2**63 - 1),
        behaviour_logprobs=[-0.5],
    )


def test_the_longest_ids_and_the_largest_numbers_are_carried(toml: Path) -> None:
    name, largest = "r" * 100, str(2**31 - 1)
    limits = ["--solver.top_k", largest, "--solver.max_new_tokens", str(2**20), "--solver.temperature", "10"]
    config = load_config(toml, ["--run.name", name, "--trainer.steps", largest, "--run.seed", largest, *limits], {})
    rollout = rollout_of(config, Problem(id="p" * 150, question="q", answer="1"), config.trainer.steps)
    assert decode(encode(rollout)) == rollout


@pytest.mark.parametrize(("field", "value"), [("seed", -1), ("seed", 2**63), ("max_new_tokens", 2**20 + 1)])
def test_numbers_beyond_are_refused_on_the_wire_too(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=field):
        SamplingParameters.model_validate({"seed": 0, "max_new_tokens": 1} | {field: value})


names = st.text(st.characters(exclude_categories=()), max_size=12) | st.from_regex(r"[\w.-]{1,9}", fullmatch=True)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=names)
@example(name="ü")
@example(name="..")
@example(name="٣")
def test_a_run_whose_name_is_accepted_can_be_carried_stored_and_reported(toml: Path, name: str) -> None:
    assume(not name.startswith("-") and "\0" not in name)  # an option; and no process has it on its command line
    try:
        config = load_config(toml, [f"--run.name={name}"], {})
    except ConfigError as error:
        assert "run.name" in str(error) or "command line" in str(error)
        return
    assert config.run.name == name
    rollout = rollout_of(config, Problem(id="p", question="q", answer="1"), 0)
    assert decode(encode(rollout)) == rollout
    assert run_key(name, "rollouts").encode("ascii").count(b"{") == 1
    assert config.run_dir.parent == config.run.dir and config.run_dir.name == name
    assert json.loads(json.dumps(config.as_report()))["run"]["name"] == name


def test_a_problem_that_fills_an_entry_of_the_queue_is_refused_at_the_start(toml: Path) -> None:
    row = {"id": "large", "question": "q" * 2000, "answer": "1"}
    (toml.parent / "t.jsonl").write_text(json.dumps(row))
    assert load_training_problems(load_config(toml, [], {}))
    with pytest.raises(ProblemFileError, match="too large for an entry of the queue: large; shorten them, or raise"):
        load_training_problems(load_config(toml, ["--queue.max_entry_bytes", "2048"], {}))


# The doors: processes.


def stepalign(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stepalign.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=folder, env=os.environ | environment)


@pytest.mark.parametrize("command", ["run", "solver", "evaluate"])
def test_a_name_that_no_rollout_carries_ends_every_process_at_once(toml: Path, command: str) -> None:
    done = stepalign(toml.parent, command, str(toml), "--run.name", "ü")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith("stepalign: command line: run.name: 'ü' is no name")


LONE = r'{"question": "q", "answer": "1", "source": "\ud800"}'
IN_METADATA = r'{"question": "q", "answer": "1", "metadata": {"a": "\ud800"}}'
DEEP = '{"question": "q", "answer": "1", "metadata": {"a": ' + "[" * 1000 + "]" * 1000 + "}}"


@pytest.mark.parametrize(
    ("command", "row"),
    [
        (["run"], LONE),
        (["run"], IN_METADATA),
        (["run"], DEEP),
        (["solver"], LONE),
        (["probe"], LONE),
        (["band", "t.jsonl", "--to", "x"], LONE),
    ],
    ids=lambda value: value[0],
)
def test_a_problem_that_no_rollout_carries_ends_every_process_at_once(toml: Path, command: list[str], row: str) -> None:
    (toml.parent / "t.jsonl").write_text(row)
    name, *rest = command
    done = stepalign(toml.parent, name, str(toml), *rest)
    assert done.returncode == 1
    assert "was refused and nothing was run:\n  line 1: " in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(os.listdir(toml.parent)) == ["run.toml", "t.jsonl"]


def test_a_file_without_a_usable_answer_is_warned_about_by_the_command(toml: Path) -> None:
    (toml.parent / "t.jsonl").write_text(json.dumps({"question": "q", "answer": "First 2.\nThen 3."}))
    done = stepalign(toml.parent, "run", str(toml))
    warning, error = done.stderr.splitlines()
    assert "t.jsonl: no answer of its 1 problems looks like one that a tagged answer can equal" in warning
    assert error.startswith("stepalign: model.path: there is no model")


@pytest.mark.redis
def test_an_audit_finds_the_runs_name_from_inside_its_folder(toml: Path, redis_server: str) -> None:
    config = load_config(toml, ["--run.dir", str(toml.parent), "--run.name", "inside"], {})
    queue_settings = config.queue.model_copy(update={"redis_url": redis_server})
    rollout = rollout_of(config, Problem(id="p", question="q", answer="1"), 0)

    async def publish() -> None:
        queue = open_queue(queue_settings, config.run.name, "solver")
        await queue.publish([rollout])
        await queue.close()

    asyncio.run(publish())
    config.run_dir.mkdir()
    config.folder.record.write_text("{}")
    rows = [{key: [rollout.rollout_id]} for key in ("offered", "admitted")]
    config.folder.published.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = stepalign(config.run_dir, "run", "audit", ".", "--json", REDIS_URL=redis_server)
    assert (done.returncode, json.loads(done.stdout)["pending"]) == (0, 1), done.stderr
