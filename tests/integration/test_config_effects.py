"""Every field of the configuration has an effect: changed alone it shows in a run, or it is refused.

``EFFECTS`` has one entry for each field; a new field without one fails. Observations come from the real commands on a
small scale (tests/support/observed_runs.py). An observation is compared between two configurations that differ in one
field.
"""

from __future__ import annotations

import asyncio
import shlex
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from string import Template
from typing import Any

import httpx
import pytest
import torch
from pydantic import BaseModel
from redis import Redis

from stepalign.errors import ConfigError, CriticError, CriticUnavailableError, ProblemFileError, QueueUnavailableError
from stepalign.types import CritiqueRequest
from stepalign_lab.pretrain import small_llama
from stepalign_lab.tokenizer import build_tokenizer
from stepalign_run.config import Config, QueueSection
from stepalign_run.queue import open_queue
from stepalign_run.rollout import Rollout
from stepalign_run.testing import MemoryBroker, MemoryRolloutQueue
from stepalign_trainer.batch.critiques import open_critic
from support.critic_servers import metric, wait_until
from support.observed_runs import Bench, Evaluated, Served, Trained, exact_critic


@dataclass(frozen=True)
class Shows:
    """``observation`` is another one with ``change`` than without it. ``given`` holds for both."""

    observation: str
    change: str
    given: str = ""


@dataclass(frozen=True)
class Refused:
    """What the observation ends in with ``change``. Without it, it ends in no error."""

    observation: str
    change: str
    error: type[Exception]
    message: str
    given: str = ""


ABSENT = "mps" if torch.cuda.is_available() else "cuda"
"""A device that this machine has not."""
HOT = "--solver.temperature 5"
GRPO = "--run.arm grpo --arm.group_size 4 --data.grader odd --solver.temperature 2.3"
NEGATIVE = f"--run.arm fixed_negative {HOT}"
TWICE = f"{GRPO} --arm.grpo.num_iterations 2"
WATCHED = f"--run.arm refsol --trainer.steps 2 --alarms.window 1 {HOT} --solver.max_new_tokens 24"
BACKEND = "--critic.backend transformers"
MODEL_CRITIC = f"{BACKEND} --critic.check_known_attempts false"
FOUR_STEPS = "--trainer.steps 4 --evaluation.every 4"
KEYED = "--critic.api_keys_file $folder/password"
TOGETHER = f"{MODEL_CRITIC} --critic.batch_wait_ms 500 --critic.cache_entries 0"

EFFECTS: dict[str, Shows | Refused] = {
    "run.name": Shows("files", "--run.name other"),
    "run.dir": Shows("files", "--run.dir $folder/elsewhere"),
    "run.seed": Shows("texts", "--run.seed 1", HOT),
    "run.arm": Shows("teacher prompts", "--run.arm refsol"),
    "run.heartbeat_file": Shows("heartbeat", "--run.heartbeat_file $folder/beat"),
    # The arm.
    "arm.objective": Shows("loss", "--arm.objective fixed_negative", "--run.arm null"),
    "arm.context": Shows("teacher prompts", "--arm.context other_problem", "--run.arm refsol"),
    "arm.scope": Shows("tokens in scope", "--arm.scope full"),
    "arm.group_size": Shows("groups", "--arm.group_size 2"),
    "arm.grpo.scale_rewards": Shows("gradient", "--arm.grpo.scale_rewards false", GRPO),
    "arm.grpo.normalisation": Shows("gradient", "--arm.grpo.normalisation sequence", GRPO),
    "arm.grpo.epsilon": Shows("clipped", "--arm.grpo.epsilon 1e-6", f"{TWICE} --arm.grpo.epsilon_high 0.9"),
    "arm.grpo.epsilon_high": Shows("clipped", "--arm.grpo.epsilon_high 1e-6", f"{TWICE} --arm.grpo.epsilon 0.9"),
    "arm.grpo.num_iterations": Shows("adapter", "--arm.grpo.num_iterations 2", GRPO),
    "arm.grpo.beta": Shows("adapter", "--arm.grpo.beta 5", TWICE),
    # The tokens of a whole solution of the first problem, without its EOS.
    "arm.grpo.reward_needs_eos": Shows(
        "reward", "--arm.grpo.reward_needs_eos false", f"{GRPO} --solver.temperature 1.1 --solver.max_new_tokens 31"
    ),
    "arm.fixed_negative.advantage": Shows("loss", "--arm.fixed_negative.advantage=-2", NEGATIVE),
    "arm.fixed_negative.max_probability": Shows("loss", "--arm.fixed_negative.max_probability 0.01", NEGATIVE),
    # The model.
    "model.path": Shows("texts", "--model.path $folder/other_solver"),
    "model.prompts": Shows(
        "student prompts",
        "--model.prompts sums-v1",
        "--solver.max_prompt_tokens 200 --trainer.max_teacher_prompt_tokens 300",
    ),
    "model.device": Refused("texts", f"--model.device {ABSENT}", ConfigError, f"finds no {ABSENT} device"),
    "model.dtype": Shows("loss", "--model.dtype bfloat16", "--solver.merge_adapter false"),
    "model.chat_template_options": Shows("student prompts", "--model.chat_template_options loud=true"),
    "model.teacher_chat_template_options": Shows(
        "teacher prompts", "--model.teacher_chat_template_options loud=true"
    ),
    # The problems.
    "data.train": Shows("problems", "--data.train $folder/other.jsonl"),
    "data.validation": Shows("validation figures", "--data.validation $folder/other.jsonl"),
    "data.test": Shows("test figures", "--data.test $folder/other.jsonl"),
    "data.grader": Shows("test figures", "--data.grader odd", "--critic.grader exact"),
    "data.checker": Shows("test figures", "--data.checker lab"),
    "data.answer_choices": Shows("chance", "--data.answer_choices 10"),
    # The queue.
    "queue.redis_url": Shows("server", "--queue.redis_url $redis_without_password"),
    "queue.redis_password_file": Shows(
        "server", "--queue.redis_password_file $folder/password", "--queue.redis_url $redis_without_password"
    ),
    "queue.reconnect_seconds": Shows("connections", "--queue.reconnect_seconds 0.5", "--queue.reconnect_seconds 0"),
    "queue.capacity": Shows("admissions", "--queue.capacity 12"),
    "queue.claim_idle_seconds": Shows("claims of another consumer", "--queue.claim_idle_seconds 30"),
    "queue.max_deliveries": Shows("dead letters", "--queue.max_deliveries 2"),
    "queue.max_entry_bytes": Refused(
        "admissions", "--queue.max_entry_bytes 1024", ValueError, "raise queue.max_entry_bytes"
    ),
    # The critic, as the trainer sees it.
    "critic.url": Refused("texts", "--critic.url $critic_url/nowhere", CriticError, "/nowhere"),
    "critic.api_key_file": Shows("critic keys", "--critic.api_key_file $folder/password"),
    "critic.timeout_seconds": Refused(
        "slow critique", "--critic.timeout_seconds 0.1", CriticUnavailableError, "no answer"
    ),
    "critic.concurrency": Shows("requests at once", "--critic.concurrency 2"),
    # The critic's own process.
    "critic.backend": Shows("critic", BACKEND),
    "critic.path": Shows("critic", "--critic.path $folder/solver", MODEL_CRITIC),
    "critic.check_known_attempts": Refused(
        "critic",
        "--critic.check_known_attempts true",
        ConfigError,
        "does not tell right steps from wrong",
        f"{MODEL_CRITIC} --critic.path $random_critic",
    ),
    "critic.decoding": Shows("critic", "--critic.decoding free", MODEL_CRITIC),
    "critic.trust_answers": Shows("critic on a lucky answer", "--critic.trust_answers false", MODEL_CRITIC),
    "critic.wrong_threshold": Shows(
        "critic on a lucky answer",
        "--critic.wrong_threshold 0.9999999999",
        f"{MODEL_CRITIC} --critic.trust_answers false",
    ),
    "critic.checker": Refused("critic", "--critic.checker nobody", ConfigError, "critic.checker is 'nobody'"),
    "critic.prompts": Shows("critic", "--critic.prompts sums-v1", MODEL_CRITIC),
    "critic.grader": Refused("critic", "--critic.grader nobody", ConfigError, "critic.grader is 'nobody'"),
    "critic.chat_template_options": Shows("critic", "--critic.chat_template_options loud=true", MODEL_CRITIC),
    "critic.device": Refused(
        "critic", f"--critic.device {ABSENT}", ConfigError, f"finds no {ABSENT} device", MODEL_CRITIC
    ),
    "critic.dtype": Shows("critic weights", "--critic.dtype bfloat16", MODEL_CRITIC),
    "critic.host": Refused("critic", "--critic.host 0.0.0.0", ConfigError, "there are no API keys"),
    "critic.port": Shows("critic port", "--critic.port $port"),
    "critic.api_keys_file": Shows("critic", "--critic.api_keys_file $folder/password"),
    "critic.metrics_host": Shows("critic metrics", "--critic.metrics_host 127.0.0.2", KEYED),
    "critic.metrics_port": Shows("critic metrics", "--critic.metrics_port 0", KEYED),
    "critic.drain_grace_seconds": Shows("critic while draining", "--critic.drain_grace_seconds 60"),
    "critic.finish_seconds": Shows(
        "critic while it ends", "--critic.finish_seconds 0", f"{MODEL_CRITIC} --critic.batch_wait_ms 900"
    ),
    "critic.keep_alive_seconds": Shows("critic keeps a connection", "--critic.keep_alive_seconds 1"),
    "critic.max_connections": Shows("critic keeps a connection", "--critic.max_connections 1"),
    "critic.cors_origins": Shows("critic from a page", "--critic.cors_origins [\"https://a.example\"]"),
    "critic.address_file": Shows("critic address", "--critic.address_file $folder/critic.url"),
    "critic.max_body_bytes": Shows("critic at a long attempt", "--critic.max_body_bytes 1024"),
    "critic.max_steps": Shows("critic", "--critic.max_steps 1"),
    "critic.max_batch_items": Shows("critic at two items", "--critic.max_batch_items 1"),
    "critic.cache_entries": Shows("critic asked twice", "--critic.cache_entries 0"),
    "critic.cache_redis_url": Shows("critic asked by two", "--critic.cache_redis_url $cache_with_password"),
    "critic.cache_redis_password_file": Shows(
        "critic asked by two",
        "--critic.cache_redis_password_file $folder/cache_password",
        "--critic.cache_redis_url $cache_without_password",
    ),
    "critic.cache_ttl_seconds": Shows(
        "time to live", "--critic.cache_ttl_seconds 60", "--critic.cache_redis_url $cache_with_password"
    ),
    "critic.rate_limit_per_minute": Shows("critic asked twice", "--critic.rate_limit_per_minute 1"),
    **{
        f"critic.{field}": Refused("critic", f"--critic.{field} {value}", ConfigError, "has no effect with backend")
        for field, value in {
            # What they do with their backend: test_openai_backend.py, test_openai_dialects.py and tests/vllm.
            "openai.base_url": "http://127.0.0.1:9/v1",
            "openai.model": "m",
            "openai.revision": "r",
            "openai.api_key_file": "$folder/password",
            "openai.timeout_seconds": "1",
            "openai.max_tokens_field": "max_completion_tokens",
            "openai.omit": "temperature",
            "openai.extra_body": "top_k=1",
            "openai.probe": "false",
            "openai.grammar": "grammar",
            "openai.logprobs": "false",
            "vllm.gpu_memory_utilization": "0.5",
            "vllm.tensor_parallel_size": "2",
            "vllm.engine_args": "seed=1",
        }.items()
    },
    "critic.max_prompt_tokens": Shows("critic", "--critic.max_prompt_tokens 20", MODEL_CRITIC),
    "critic.max_new_tokens": Shows("critic", "--critic.max_new_tokens 20", MODEL_CRITIC),
    "critic.max_batch": Shows("critic batches", "--critic.max_batch 2", TOGETHER),
    "critic.max_queue": Shows("critic statuses", "--critic.max_queue 1", TOGETHER),
    "critic.batch_wait_ms": Shows("first batch is whole", "--critic.batch_wait_ms 500", MODEL_CRITIC),
    # The solver.
    "solver.temperature": Shows("texts", "--solver.temperature 5"),
    "solver.top_p": Shows("texts", "--solver.top_p 0.1", HOT),
    "solver.top_k": Shows("texts", "--solver.top_k 1", HOT),
    "solver.max_new_tokens": Shows("texts", "--solver.max_new_tokens 16"),
    "solver.batch": Shows("samplings", "--solver.batch 3"),
    "solver.max_prompt_tokens": Refused(
        "texts", "--solver.max_prompt_tokens 10", ProblemFileError, "over its budget of 10"
    ),
    "solver.merge_adapter": Shows("sampled by", "--solver.merge_adapter false", "--trainer.steps 2"),
    # The trainer.
    "trainer.steps": Shows("adapters", "--trainer.steps 2"),
    "trainer.batch": Shows("texts", "--trainer.batch 3"),
    "trainer.micro_batch": Shows("forwards", "--trainer.micro_batch 3"),
    "trainer.learning_rate": Shows("adapter", "--trainer.learning_rate 1e-4"),
    "trainer.max_grad_norm": Shows("adapter", "--trainer.max_grad_norm 1e-6"),
    "trainer.max_teacher_prompt_tokens": Shows("outcomes", "--trainer.max_teacher_prompt_tokens 50"),
    "trainer.logit_chunk": Shows("head calls", "--trainer.logit_chunk 10"),
    "trainer.checkpoint_every": Shows("files", "--trainer.checkpoint_every 2", FOUR_STEPS),
    "trainer.keep_checkpoints": Shows("files", "--trainer.keep_checkpoints 3", FOUR_STEPS),
    "trainer.token_view": Shows("shown rollouts", "--trainer.token_view 3"),
    "trainer.lora.rank": Shows("adapter shapes", "--trainer.lora.rank 2"),
    "trainer.lora.alpha": Shows("gradient", "--trainer.lora.alpha 16"),
    "trainer.lora.target_modules": Shows("adapter shapes", "--trainer.lora.target_modules q_proj"),
    # The evaluation.
    "evaluation.temperature": Shows("evaluated texts", "--evaluation.temperature 5"),
    "evaluation.top_p": Shows("evaluated texts", "--evaluation.top_p 0.1", "--evaluation.temperature 5"),
    "evaluation.top_k": Shows("evaluated texts", "--evaluation.top_k 1", "--evaluation.temperature 5"),
    "evaluation.max_new_tokens": Shows("evaluated texts", "--evaluation.max_new_tokens 16"),
    "evaluation.samples": Shows("evaluated texts", "--evaluation.samples 3"),
    "evaluation.every": Shows("evaluated steps", "--evaluation.every 2", "--trainer.steps 3"),
    "evaluation.batch": Shows("evaluation samplings", "--evaluation.batch 3"),
    # Alarms, between the first and the second update.
    "alarms.window": Shows("alarms", "--alarms.window 3", f"{WATCHED} --alarms.signal_share 1"),
    "alarms.entropy_factor": Shows("alarms", "--alarms.entropy_factor 1.5", WATCHED),
    "alarms.entropy_floor": Shows("alarms", "--alarms.entropy_floor 100", f"{WATCHED} --alarms.entropy_factor 1.5"),
    "alarms.length_factor": Shows("alarms", "--alarms.length_factor 1.2", WATCHED),
    "alarms.truncated": Shows("alarms", "--alarms.truncated 1.0", f"{WATCHED} --solver.max_new_tokens 4"),
    "alarms.grad_norm_factor": Shows(
        "alarms", "--alarms.grad_norm_factor 2", f"{WATCHED} --trainer.learning_rate 0.1"
    ),
    "alarms.signal_share": Shows("alarms", "--alarms.signal_share 1.0", WATCHED),
    "alarms.first_token_kl": Shows("alarms", "--alarms.first_token_kl 1e-9", WATCHED),
}  # fmt: skip

ALSO: list[tuple[str, Shows | Refused]] = [
    ("run.seed", Shows("evaluated texts", "--run.seed 1", "--evaluation.temperature 5")),
    ("run.heartbeat_file", Shows("evaluation heartbeat", "--run.heartbeat_file $folder/beat")),
    ("model.path", Shows("evaluated texts", "--model.path $folder/other_solver")),
    ("model.device", Refused("evaluated texts", f"--model.device {ABSENT}", ConfigError, f"finds no {ABSENT} device")),
    (
        "model.chat_template_options",
        Shows("evaluated texts", "--model.chat_template_options loud=true", "--evaluation.temperature 5"),
    ),
    ("data.grader", Shows("reward", "--data.grader odd", "--run.arm grpo --arm.group_size 4 --critic.grader exact")),
    ("data.checker", Shows("first errors", "--data.checker lab", "--run.arm refsol")),
    ("solver.merge_adapter", Shows("evaluated by", "--solver.merge_adapter false")),
]
"""What fields do in another process than that of their entry above."""

CASES = [*EFFECTS.items(), *ALSO]

Overrides = list[str]
Observe = Callable[[Bench, Overrides], Any]


def in_training(pick: Callable[[Trained], Any]) -> Observe:
    return lambda bench, overrides: pick(bench.trained(overrides))


def in_evaluation(pick: Callable[[Evaluated], Any]) -> Observe:
    return lambda bench, overrides: pick(bench.evaluated(overrides))


def while_served(act: Callable[[Served], Any]) -> Observe:
    return lambda bench, overrides: bench.served(overrides, act)


# The queue's classes, on one script.


def settings_of(bench: Bench, overrides: Overrides) -> QueueSection:
    return bench.config(overrides).queue


def rollouts_of(bench: Bench, count: int) -> list[Rollout]:
    (rollout, *_) = [rollout for group in bench.trained().published for rollout in group]
    return [rollout.model_copy(update={"rollout_id": f"r{i}", "group_id": f"g{i}"}) for i in range(count)]


def admissions(bench: Bench, overrides: Overrides) -> list[str]:
    queue = MemoryRolloutQueue(MemoryBroker(), "solver", settings_of(bench, overrides))
    return [str(asyncio.run(queue.publish([rollout]))) for rollout in rollouts_of(bench, 20)]


def claims_of_another_consumer(bench: Bench, overrides: Overrides) -> int:
    """Forty seconds after a consumer claimed two rollouts and fell silent."""
    now, broker, settings = [0.0], MemoryBroker(), settings_of(bench, overrides)
    rollouts = rollouts_of(bench, 2)

    async def story() -> int:
        first, second = (MemoryRolloutQueue(broker, name, settings, lambda: now[0]) for name in ("first", "second"))
        for rollout in rollouts:
            await first.publish([rollout])
        await first.claim(2, 0.0)
        now[0] = 40.0
        return len(await second.claim(2, 0.0))

    return asyncio.run(story())


def dead_letters(bench: Bench, overrides: Overrides) -> int:
    """After three consumers have claimed a rollout and died."""
    broker, settings = MemoryBroker(), settings_of(bench, overrides)
    rollouts = rollouts_of(bench, 1)

    async def story() -> int:
        await MemoryRolloutQueue(broker, "solver", settings).publish(rollouts)
        for life in range(3):
            now = 1000.0 * life
            await MemoryRolloutQueue(broker, f"trainer {life}", settings, lambda now=now: now).claim(1, 0.0)
        return broker.status().dead

    return asyncio.run(story())


def server(bench: Bench, overrides: Overrides) -> str:
    async def ask() -> str:
        queue = open_queue(settings_of(bench, overrides), "effects", "somebody")
        try:
            await queue.start()
        except QueueUnavailableError as error:
            return str(error)
        finally:
            await queue.close()
        return "accepted"

    return asyncio.run(ask())


def connections(bench: Bench, overrides: Overrides) -> int:
    """How often a server is tried that hangs up at once."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        tries: list[int] = []

        def hang_up() -> None:
            while True:
                try:
                    listening.accept()[0].close()
                except OSError:
                    return
                tries.append(1)

        threading.Thread(target=hang_up, daemon=True).start()
        url = f"redis://127.0.0.1:{listening.getsockname()[1]}"
        server(bench, [*overrides, "--queue.redis_url", url])
        return len(tries)


# The critic, from the trainer's side and from its own.

STEPS = "<step_1> 3 + 4 = 7 </step_1> <step_2> 7 * 7 = 8 </step_2> <answer> 8 </answer>"
LUCKY = "<step_1> 3 + 4 = 8 </step_1> <step_2> 8 * 7 = 9 </step_2> <answer> 9 </answer>"
REQUEST = CritiqueRequest(
    question="3 + 4 * 7", attempt=STEPS, answer="9", reference_solution="7 is 4 + of 3 ; 9 is 7 * of 7 ; so 9"
)


def slow_critique(bench: Bench, overrides: Overrides) -> str:
    """The trainer's client at a critic that takes its time."""
    settings = bench.config(overrides).critic
    bench.recorder.reset(hold=0.4)

    async def main() -> str:
        critic = open_critic(settings)
        assert critic is not None
        async with critic:
            response = await critic.critique(REQUEST)
        assert response.critique is not None
        return response.critique.text

    return asyncio.run(main())


def requests_at_once(bench: Bench, overrides: Overrides) -> int:
    bench.train(overrides, critic_holds=0.4)
    return bench.recorder.most


def ask(critic: Served, attempt: str = STEPS, **headers: str) -> dict[str, Any]:
    """What the service makes of one request: status, and what stays the same when it is asked again."""
    request = REQUEST.model_copy(update={"attempt": attempt})
    answer = httpx.post(f"{critic.url}/v1/critiques", json=request.model_dump(), headers=headers, timeout=30)
    content = answer.json()
    content.pop("id", None)
    return {"status": answer.status_code, **content}


def ask_two_in_a_batch(critic: Served) -> int:
    """The status of one request with two items."""
    items = [REQUEST.model_dump(mode="json")] * 2
    return httpx.post(f"{critic.url}/v1/critiques/batch", json={"items": items}, timeout=30).status_code


def ask_twice(critic: Served) -> list[tuple[int, str | None]]:
    """Status of two equal requests, and where their answers came from."""
    body = REQUEST.model_dump(mode="json")
    answers = [httpx.post(f"{critic.url}/v1/critiques", json=body, timeout=30) for _ in range(2)]
    return [(answer.status_code, answer.headers.get("x-stepalign-cache")) for answer in answers]


def keeps_a_connection(critic: Served) -> bool:
    """Whether an idle connection outlives another one and some seconds."""
    with httpx.Client(base_url=critic.url) as first, httpx.Client(base_url=critic.url) as second:
        for client in (first, second):
            client.get("/health/live")
        time.sleep(2.5)
        # A closed one would be opened anew.
        opened: list[str] = []
        trace = {"trace": lambda event, _: opened.append(event)}
        first.get("/health/live", extensions=trace)
        return not any(event.startswith("connection.connect_tcp") for event in opened)


def ask_from_a_page(critic: Served) -> str | None:
    """The origin whose pages may read an answer."""
    answer = httpx.get(f"{critic.url}/version", headers={"origin": "https://a.example"})
    return answer.headers.get("access-control-allow-origin")


def asked_by_two(bench: Bench, overrides: Overrides) -> Any:
    """Where the second of two critics had its answer from."""
    ask_one = while_served(ask_twice)
    ask_one(bench, overrides)
    second = ask_one(bench, overrides)
    cached_lives(bench)
    return second


def cached_lives(bench: Bench) -> list[int]:
    """How long the shared answers would have stayed, in seconds; they are deleted."""
    with Redis.from_url(bench.cache_url) as redis:
        keys: Any = list(redis.scan_iter("stepalign:critique:*"))
        lives: list[Any] = [redis.ttl(key) for key in keys]
        if keys:
            redis.delete(*keys)
    return lives


def time_to_live(bench: Bench, overrides: Overrides) -> bool:
    """Whether what a critic put into the server stays there for more than an hour."""
    # Other tests of this session share the server.
    cached_lives(bench)
    while_served(ask_twice)(bench, overrides)
    return min(cached_lives(bench)) > 3600


def metrics_of(_: Served) -> list[bool]:
    """Whether metrics are served at the default address, and at another one."""

    def answers(host: str) -> bool:
        try:
            return httpx.get(f"http://{host}:8301/metrics").status_code == 200
        except httpx.ConnectError:
            return False

    return [answers("127.0.0.1"), answers("127.0.0.2")]


def address_of(bench: Bench, overrides: Overrides) -> tuple[bool, bool]:
    """Whether a file holds the address of a critic that listens, and whether there is one after its end."""
    file = bench.folder / "critic.url"
    held = bench.served(overrides, lambda critic: file.exists() and file.read_text() == critic.url)
    return held, file.exists()


def ask_while_draining(critic: Served) -> bool:
    """Whether there is an answer. What stops at once refuses by a 503 or by the connection, as the moment has it."""
    critic.server.handle_exit(15, None)
    try:
        return ask(critic)["status"] == 200
    except httpx.TransportError:
        return False


def ask_and_end(critic: Served) -> int:
    """The status of a request that is not answered yet when the critic is told to end."""
    with ThreadPoolExecutor() as threads:
        asked = threads.submit(ask, critic)
        wait_until(lambda: metric(critic.url, "stepalign_critic_in_flight") == 1)
        critic.server.handle_exit(15, None)
        return asked.result()["status"]


def ask_four(critic: Served) -> tuple[list[int], list[int]]:
    """Statuses of four requests that come shortly after one another, and the batches they were generated in."""

    async def main() -> list[int]:
        async def one(client: httpx.AsyncClient, place: int) -> int:
            await asyncio.sleep(0.03 * place)
            request = REQUEST.model_copy(update={"attempt": f"{STEPS} {place}"})
            return (await client.post("/v1/critiques", json=request.model_dump())).status_code

        async with httpx.AsyncClient(base_url=critic.url, timeout=30) as client:
            return await asyncio.gather(*(one(client, place) for place in range(4)))

    return asyncio.run(main()), critic.batches


OBSERVATIONS: dict[str, Observe] = {
    "critic keys": in_training(lambda run: run.critic_keys),
    "first errors": in_training(lambda run: run.column("advantage_at_error")),
    "files": in_training(lambda run: run.files),
    "heartbeat": in_training(lambda run: run.heartbeat),
    "texts": in_training(lambda run: sorted(r.text for group in run.published for r in group)),
    "problems": in_training(lambda run: sorted(r.problem.id for group in run.published for r in group)),
    "groups": in_training(lambda run: [[r.rollout_id for r in group] for group in run.published]),
    "samplings": in_training(lambda run: run.samplings),
    "sampled by": in_training(lambda run: run.sampled_by),
    "student prompts": in_training(lambda run: [example.student_prompt for example in run.examples]),
    "teacher prompts": in_training(lambda run: [example.teacher_prompt for example in run.examples]),
    "tokens in scope": in_training(lambda run: run.column("tokens_in_scope")),
    "loss": in_training(lambda run: run.column("loss")),
    "gradient": in_training(lambda run: run.column("grad_norm")),
    "clipped": in_training(lambda run: run.column("clip_fraction")),
    "reward": in_training(lambda run: run.column("reward_mean")),
    "outcomes": in_training(lambda run: run.column("outcomes")),
    "alarms": in_training(lambda run: run.column("alarms")),
    "adapter": in_training(lambda run: run.adapters[-1]),
    "adapters": in_training(lambda run: run.adapters),
    "adapter shapes": in_training(lambda run: run.shapes),
    "forwards": in_training(lambda run: run.forwards),
    "head calls": in_training(lambda run: run.head_tokens),
    "shown rollouts": in_training(lambda run: [row["rollout_id"] for row in run.tokens]),
    "evaluated texts": in_evaluation(lambda seen: [completion.text for completion in seen.completions]),
    "evaluation samplings": in_evaluation(lambda seen: seen.samplings),
    "evaluated by": in_evaluation(lambda seen: seen.sampled_by),
    "evaluation heartbeat": in_evaluation(lambda seen: seen.heartbeat),
    "evaluated steps": in_evaluation(lambda seen: seen.steps),
    "validation figures": in_evaluation(lambda seen: seen.figures["validation"]),
    "test figures": in_evaluation(lambda seen: seen.figures["test"]),
    "chance": in_evaluation(lambda seen: seen.chance),
    "server": server,
    "connections": connections,
    "admissions": admissions,
    "claims of another consumer": claims_of_another_consumer,
    "dead letters": dead_letters,
    "slow critique": slow_critique,
    "requests at once": requests_at_once,
    "critic": while_served(ask),
    "critic weights": while_served(lambda critic: critic.dtype),
    "critic port": while_served(lambda critic: critic.port),
    "critic address": address_of,
    "critic while draining": while_served(ask_while_draining),
    "critic while it ends": while_served(ask_and_end),
    "critic on a lucky answer": while_served(lambda critic: ask(critic, attempt=LUCKY)),
    "critic at a long attempt": while_served(lambda critic: ask(critic, attempt="x" * 2000)),
    "critic asked twice": while_served(ask_twice),
    "critic asked by two": asked_by_two,
    "time to live": time_to_live,
    "critic metrics": while_served(metrics_of),
    "critic from a page": while_served(ask_from_a_page),
    "critic keeps a connection": while_served(keeps_a_connection),
    "critic at two items": while_served(ask_two_in_a_batch),
    "critic statuses": while_served(lambda critic: sorted(ask_four(critic)[0])),
    "critic batches": while_served(lambda critic: ask_four(critic)[1]),
    "first batch is whole": while_served(lambda critic: ask_four(critic)[1] == [4]),
}


@pytest.fixture(scope="module")
def bench(redis_server: str, cache_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder: Path = tmp_path_factory.mktemp("effects")
    with exact_critic() as (url, recorder):
        yield Bench(folder, redis_server, cache_server, url, recorder)


@pytest.fixture(scope="module")
def names(bench: Bench) -> dict[str, str]:
    """What a change may name as ``$name``."""

    def without_password(url: str, file: str) -> str:
        scheme, _, rest = url.partition("://:")
        password, _, host = rest.partition("@")
        (bench.folder / file).write_text(password)
        return f"{scheme}://{host}"

    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    return {
        "folder": str(bench.folder),
        "critic_url": bench.critic_url,
        "redis_with_password": bench.redis_url,
        "redis_without_password": without_password(bench.redis_url, "password"),
        "cache_with_password": bench.cache_url,
        "cache_without_password": without_password(bench.cache_url, "cache_password"),
        "port": str(port),
        "random_critic": str(random_critic(bench.folder / "random-critic")),
    }


def random_critic(folder: Path) -> Path:
    tokenizer = build_tokenizer(critic=True)
    small_llama(tokenizer, seed=3).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def look(bench: Bench, names: dict[str, str]) -> Callable[[str, str], Any]:
    """An observation of one configuration, made once."""
    return cache(lambda observation, overrides: OBSERVATIONS[observation](bench, words(overrides, names)))


def words(text: str, names: dict[str, str]) -> Overrides:
    return shlex.split(Template(text).substitute(names))


def leaves(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every field that is no section."""
    found: list[str] = []
    for name, info in model.model_fields.items():
        section = info.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            found += leaves(section, f"{prefix}{name}.")
        else:
            found.append(prefix + name)
    return found


def value_of(config: Config, field: str) -> Any:
    value: Any = config
    for name in field.split("."):
        value = getattr(value, name)
    return value


def differing(one: Config, other: Config) -> list[str]:
    return [field for field in leaves(Config) if value_of(one, field) != value_of(other, field)]


def test_every_field_is_in_the_table() -> None:
    assert sorted(EFFECTS) == sorted(leaves(Config))


def test_every_observation_is_of_use() -> None:
    used = {effect.observation for _, effect in CASES}
    assert used == OBSERVATIONS.keys()


@pytest.mark.slow
@pytest.mark.redis
def test_an_unchanged_run_shows_the_same_twice(bench: Bench) -> None:
    assert bench.train() == bench.trained()
    assert bench.evaluate() == bench.evaluated()


# A free port is another one each time.
UNCHANGED = {
    (effect.observation, effect.given)
    for field, effect in EFFECTS.items()
    if field.startswith(("queue.", "critic.")) and effect.observation != "critic port"
}


@pytest.mark.slow
@pytest.mark.redis
@pytest.mark.parametrize(("observation", "given"), sorted(UNCHANGED))
def test_an_unchanged_queue_or_critic_shows_the_same_twice(
    bench: Bench, names: dict[str, str], look: Callable[[str, str], Any], observation: str, given: str
) -> None:
    assert OBSERVATIONS[observation](bench, words(given, names)) == look(observation, given)


@pytest.mark.slow
@pytest.mark.redis
@pytest.mark.parametrize(("field", "effect"), CASES, ids=[f"{field}, {effect.observation}" for field, effect in CASES])
def test_a_changed_field_shows_in_a_run_or_is_refused(
    bench: Bench, names: dict[str, str], look: Callable[[str, str], Any], field: str, effect: Shows | Refused
) -> None:
    changed = f"{effect.given} {effect.change}"
    unchanged = look(effect.observation, effect.given)
    if isinstance(effect, Refused):
        with pytest.raises(effect.error) as refused:
            look(effect.observation, changed)
        assert effect.message in str(refused.value)
        return
    fields = differing(bench.config(words(effect.given, names)), bench.config(words(changed, names)))
    # The name of an arm stands for its file's keys.
    assert [found for found in fields if not (field == "run.arm" and found.startswith("arm."))] == [field]
    assert look(effect.observation, changed) != unchanged
