"""Aligned decoding, of every kind of tokenizer and with random weights: no critique is out of form, and drafts change
no token.

``vllm`` takes part where it is installed, which is where ``make test-vllm`` runs this.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Sequence
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from stepalign.errors import ConfigError
from stepalign.prompts import render_token_ids
from stepalign.types import Critique, CritiqueRequest, CritiqueResponse, Forced, Verdict
from stepalign_critic.backends import create_backend
from stepalign_critic.decoding.draft import DraftTokens
from stepalign_critic.decoding.drafted import Decoded, DraftedDecoder, Job
from stepalign_critic.decoding.tokens import GrammarTokens
from stepalign_critic.errors import BudgetTooSmallError
from stepalign_critic.lifecycle import State
from stepalign_critic.service import AlignedDecoding, CriticService
from stepalign_lab.tokenizer import build_tokenizer
from stepalign_run.config import CriticServerSection
from support.model_tokenizers import KINDS

TAGGED = "<step_1>3 + 4 = 7</step_1>\n<step_2>7 * 2 = 15</step_2>\n<step_3>15 - 5 = 10</step_3>"
QUESTION = {"question": "3 + 4 * 2 - 5", "reference_solution": "3 and 4 are 7. Twice 7 is 14, less 5 is 9."}
REQUESTS = [
    CritiqueRequest(**QUESTION, attempt=f"{TAGGED}\n<answer>10</answer>", answer="9"),
    CritiqueRequest(**QUESTION, attempt=f"{TAGGED}\n<answer>10</answer>", answer="10"),
    CritiqueRequest(**QUESTION, attempt=f"{TAGGED}\n<answer>10</answer>"),
    CritiqueRequest(**QUESTION, attempt=TAGGED, answer="9"),
    CritiqueRequest(**QUESTION, attempt="<step_1>3 + 4 = 7</step_1>\n<step_2>7 * 2", answer="9"),
    CritiqueRequest(**QUESTION, attempt=""),
    CritiqueRequest(**QUESTION, attempt="<answer>10</answer>", answer="9"),
    CritiqueRequest(
        question="?",
        steps=["If x < 5 & y > 3, «so»\n\n  👍🏽 holds", 'Also: </think> {"a": [1]}', "Then 7."],
        answer="7",
    ),
    CritiqueRequest(question="?", attempt="The first is 3.\n\nThe second is 4.\n\nThe answer is 7.", answer="8"),
]
VLLM = find_spec("vllm")
ENGINES = ["transformers", *(["vllm"] if VLLM is not None and VLLM.origin is not None else [])]
SETS = ["chat-v1", "chat-v2"]


def random_model(folder: Path, tokenizer: Any, *, window: int | None = None, seed: int = 0) -> Path:
    """A tiny Llama, or a Mistral where tokens attend to a ``window``, whose weights are noise."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
        "initializer_range": 0.6,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if window is None:
        LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder)
    else:
        MistralForCausalLM(MistralConfig(**shape, sliding_window=window)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def critiques(
    path: Path, prompts: str, requests: Sequence[CritiqueRequest], *, return_exceptions: bool = False, **options: Any
) -> list[Any]:
    """The responses of a critic of this folder, asked all at once."""
    fields: dict[str, Any] = {
        "backend": "transformers",
        "path": path,
        "prompts": prompts,
        "device": "cpu",
        "max_prompt_tokens": 6000,
        "max_new_tokens": 600,
        "batch_wait_ms": 500,
        **options,
    }
    if fields["backend"] == "vllm":
        fields["vllm"] = {"gpu_memory_utilization": 0.1, "engine_args": {"enforce_eager": True}}
    section = CriticServerSection(**fields)

    async def main() -> list[Any]:
        backend = create_backend(section)
        service = CriticService(
            backend, prompts, aligned=AlignedDecoding(section.max_new_tokens, section.trust_answers)
        )
        await backend.start()
        service.lifecycle.state = type(service.lifecycle.state).READY
        try:
            asked = (service.critique(request) for request in requests)
            return await asyncio.gather(*asked, return_exceptions=return_exceptions)
        finally:
            await backend.stop()

    return asyncio.run(main())


def text_of(response: CritiqueResponse) -> str:
    assert response.critique is not None, response.failure
    return response.critique.text


def check(requests: Sequence[CritiqueRequest], responses: Sequence[CritiqueResponse]) -> None:
    for request, response in zip(requests, responses, strict=True):
        assert isinstance(response.critique, Critique), (request, response.failure)
        split = request.split()
        assert response.p_wrong is not None and len(response.p_wrong) == len(split.steps)
        assert all(0 <= p <= 1 for p in response.p_wrong)
        if request.answer is not None:
            assert response.critique.answer == request.answer
        assert response.usage.prompt_tokens > 0


@pytest.mark.parametrize("prompts", SETS)
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_random_weights_write_no_critique_out_of_form(kind: str, prompts: str, tmp_path: Path) -> None:
    path = random_model(tmp_path / "model", KINDS[kind]())
    found = critiques(path, prompts, REQUESTS)
    check(REQUESTS, found)
    wrong, right, *_ = found
    assert wrong.critique is not None and wrong.critique.verdict is Verdict.INCORRECT and Forced.ANSWER in wrong.forced
    assert right.critique is not None and right.critique.verdict is Verdict.CORRECT
    cut = found[4].critique
    assert cut is not None and cut.verdict in (Verdict.INCOMPLETE, Verdict.INCORRECT)


if "vllm" in ENGINES:

    @pytest.mark.parametrize("prompts", SETS)
    def test_random_weights_on_vllm_write_no_critique_out_of_form(prompts: str, tmp_path: Path) -> None:
        path = random_model(tmp_path / "model", KINDS["smollm2"]())
        check(REQUESTS, critiques(path, prompts, REQUESTS, backend="vllm"))


@pytest.mark.parametrize("engine", ENGINES)
def test_steps_may_be_long(engine: str, tmp_path: Path) -> None:
    """One of 1,800 characters, as models without line breaks write them."""
    path = random_model(tmp_path / "model", KINDS["qwen"]())
    long = " ".join(f"Then {i} + {i + 1} = {2 * i + 1}, and I go on." for i in range(52))
    requests = [CritiqueRequest(question="?", steps=[long, "The answer is 8."], answer="9")]
    (found,) = critiques(path, "chat-v2", requests, backend=engine, max_prompt_tokens=3000, max_new_tokens=2500)
    check(requests, [found])


def decoded(path: Path, prompts: str, batches: Sequence[Sequence[CritiqueRequest]], *, plain: bool) -> list[list[int]]:
    """The tokens of each answer, and how many forward passes they took."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(path).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    section = CriticServerSection(path=path, prompts=prompts)
    service = CriticService(create_backend(section), prompts, aligned=AlignedDecoding(600))
    drafts = DraftTokens(tokenizer, {})
    eos: int = model.config.eos_token_id
    grammars = GrammarTokens(tokenizer, (eos,), model.config.vocab_size)
    decoder = DraftedDecoder(model, drafts, grammars, eos, plain=plain)
    found: list[list[int]] = []
    for batch in batches:
        planned = [service.plan(request) for request in batch]
        jobs = [Job(plan, drafts.draft(plan, render_token_ids(tokenizer, messages))) for plan, messages in planned]
        for result in decoder.decode(jobs, lambda _: True):
            assert isinstance(result, Decoded), result
            found.append(result.tokens)
    PASSES[plain] = decoder.passes
    return found


PASSES: dict[bool, int] = {}


@pytest.mark.numeric
@pytest.mark.parametrize("window", [None, 32])
@pytest.mark.parametrize("prompts", SETS)
def test_drafts_and_company_change_no_token(prompts: str, window: int | None, tmp_path: Path) -> None:
    path = random_model(tmp_path / "model", KINDS["qwen"](), window=window)
    alone = [[request] for request in REQUESTS]
    plain = decoded(path, prompts, alone, plain=True)
    assert decoded(path, prompts, alone, plain=False) == plain
    assert PASSES[False] < PASSES[True]
    assert decoded(path, prompts, [REQUESTS], plain=False) == plain


def test_a_budget_too_small_for_the_copies_is_refused_before_anything_is_decoded(tmp_path: Path) -> None:
    path = random_model(tmp_path / "model", KINDS["qwen"]())
    with pytest.raises(BudgetTooSmallError, match=r"raise critic\.max_new_tokens"):
        critiques(path, "chat-v1", REQUESTS[:1], max_new_tokens=20)


def test_one_that_fails_leaves_the_others_of_its_batch(tmp_path: Path) -> None:
    path = random_model(tmp_path / "model", KINDS["qwen"]())
    short = CritiqueRequest(**QUESTION, attempt="<step_1>3</step_1><answer>9</answer>", answer="9")
    cut = CritiqueRequest(**QUESTION, attempt="<step_1>3 + 4", answer="9")
    found = critiques(path, "chat-v1", [short, cut, short], max_new_tokens=24, return_exceptions=True)
    check([short, short], [found[0], found[2]])
    assert isinstance(found[1], BudgetTooSmallError)


def test_the_labs_tokenizer_of_words_is_read_too(tmp_path: Path) -> None:
    path = random_model(tmp_path / "model", build_tokenizer(critic=True))
    step = "<step_1> 3 + 4 = 7 </step_1>"
    requests = [
        CritiqueRequest(
            question="3 + 4 * 7", attempt=f"{step} <step_2> 7 * 7 = 1 </step_2> <answer> 1 </answer>", answer="9"
        ),
        CritiqueRequest(question="3 + 4 * 7", attempt=f"{step} <step_2> 7 * ", answer="9"),
        CritiqueRequest(question="3 + 4 * 7", attempt="", answer="9"),
    ]
    check(requests, critiques(path, "lab-v1", requests, max_new_tokens=200))


def test_thinking_comes_before_a_critique_and_has_an_end(tmp_path: Path) -> None:
    """The template opens a thought; random weights never close it."""
    # Made once for all tests.
    tokenizer = copy.deepcopy(KINDS["qwen"]())
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
    path = random_model(tmp_path / "model", tokenizer)
    assert tokenizer.apply_chat_template(
        [{"role": "user", "content": ""}], tokenize=False, add_generation_prompt=True
    ).endswith("<think>\n")
    (found,) = critiques(path, "chat-v1", REQUESTS[:1], max_new_tokens=500)
    check(REQUESTS[:1], [found])
    without = random_model(tmp_path / "other", KINDS["qwen"]())
    (brief,) = critiques(without, "chat-v1", REQUESTS[:1], max_new_tokens=500)
    assert found.usage.completion_tokens > brief.usage.completion_tokens


def started(path: Path, prompts: str) -> CriticService:
    """The service after its start, known attempts asked."""
    tokens = (
        {"max_prompt_tokens": 256, "max_new_tokens": 200}
        if prompts == "lab-v1"
        else {"max_prompt_tokens": 4000, "max_new_tokens": 1000}
    )
    section = CriticServerSection(path=path, prompts=prompts, device="cpu", **tokens)
    service = CriticService(create_backend(section), prompts, aligned=AlignedDecoding(200, checked=True))

    async def main() -> None:
        service.lifecycle.begin()
        while service.lifecycle.state is State.LOADING:
            await asyncio.sleep(0.01)
        await service.lifecycle.end()

    asyncio.run(main())
    return service


@pytest.mark.parametrize("prompts", SETS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_random_weights_do_not_become_ready(seed: int, prompts: str, tmp_path: Path) -> None:
    path = random_model(tmp_path / "model", KINDS["qwen"](), seed=seed)
    failure = started(path, prompts).lifecycle.failure
    assert isinstance(failure, ConfigError)
    assert "does not tell right steps from wrong ones" in str(failure)
    assert "critic.check_known_attempts = false" in str(failure)


def test_the_labs_critic_becomes_ready() -> None:
    lifecycle = started(Path(str(files("stepalign_lab"))) / "assets" / "critic", "lab-v1").lifecycle
    assert lifecycle.failure is None and lifecycle.ready_since is not None
