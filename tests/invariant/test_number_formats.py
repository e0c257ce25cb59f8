"""What a run asserts of its model, in every number format: healthy models pass, broken ones are refused.

Models are tiny and random, their logits as large as those of real ones (some tens). Rounding depends on length, threads
and CPU: no test here compares digits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from stepalign.errors import ConfigError, NonFiniteError, PolicyError
from stepalign_models.loading import load_policy
from stepalign_models.sampling import Sampler
from stepalign_run.config import Config, Dtype, load_config
from stepalign_run.policy_store import PolicyVersion, file_sha256, verify_canary
from stepalign_solver.worker import CANARY_TOLERANCE
from stepalign_trainer.batch.examples import Example
from stepalign_trainer.batch.scope import TokenGroups
from stepalign_trainer.update.canary import measure_canary
from stepalign_trainer.update.learner import Learner
from support.model_tokenizers import KINDS

pytestmark = pytest.mark.numeric

VOCABULARY = 448
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEALTHY: dict[str, PretrainedConfig] = {
    "qwen3": Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
    "llama": LlamaConfig(**SIZES),
    "gemma3": Gemma3TextConfig(**SIZES, head_dim=16, sliding_window=16),
}
CHANGED_AFTER_THE_HEAD: dict[str, PretrainedConfig] = {
    "gemma2, soft cap": Gemma2Config(**SIZES, head_dim=16, final_logit_softcapping=30.0),
    "cohere, scale": CohereConfig(**SIZES, logit_scale=0.0625),
    "granite, scale": GraniteConfig(**SIZES, logits_scaling=8.0),
}
LENGTHS = (1, 7, 64, 301)
FORMATS = list(Dtype)


@pytest.fixture(autouse=True)
def own_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @cache
    def make(name: str) -> Path:
        torch.manual_seed(0)
        model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config := (HEALTHY | CHANGED_AFTER_THE_HEAD)[name])](config)
        with torch.no_grad():
            # Logits of some tens: the last hidden states are normed, the head's rows are not.
            model.get_output_embeddings().weight.normal_(0, 1)
        path: Path = tmp_path_factory.mktemp("model")
        model.save_pretrained(path)
        KINDS["qwen"]().save_pretrained(path)
        (path / "train.jsonl").write_text('{"question": "3 + 4?", "answer": "7"}\n', encoding="utf-8")
        (path / "config.toml").write_text(
            'critic = { backend = "program", checker = "lab" }\nmodel = { path = "." }\n'
            'data = { train = "train.jsonl" }\nsolver = { merge_adapter = false, max_new_tokens = 512 }\n'
            "trainer = { lora = { rank = 4, alpha = 8 } }\n",
            encoding="utf-8",
        )
        return path

    return make


@pytest.fixture
def configure(folder_of: Callable[[str], Path]) -> Callable[..., Config]:
    def make(name: str, dtype: Dtype, *overrides: str) -> Config:
        given = ["--model.dtype", dtype.value, "--model.device", "cpu", *overrides]
        return load_config(folder_of(name) / "config.toml", given, environ={})

    return make


@pytest.fixture
def learner_of(configure: Callable[..., Config]) -> Callable[..., Learner]:
    return lambda name, dtype: Learner(configure(name, dtype), KINDS["qwen"]())


def sequence(length: int) -> tuple[list[int], list[int]]:
    drawn = torch.randint(VOCABULARY, (length + 40,), generator=torch.Generator().manual_seed(length)).tolist()
    return drawn[:40], drawn[40:]


def stir(learner: Learner, size: float) -> None:
    """Give the adapter weights, as updates do."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in learner.parameters:
            parameter.add_(torch.randn_like(parameter), alpha=size)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_model_passes_at_every_length_and_with_any_threads(
    learner_of: Callable[..., Learner], name: str, dtype: Dtype
) -> None:
    learner = learner_of(name, dtype)
    # Two threads on a busy machine wait for each other: few of them.
    for threads, lengths in ((1, LENGTHS), (2, (64,))):
        torch.set_num_threads(threads)
        for length in lengths:
            learner.check_teacher_is_student(*sequence(length))
    # What makes it hard: the largest logits are some tens.
    assert learner.logits(*sequence(64)).abs().max() > 15


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("name", HEALTHY)
def test_a_library_may_round_by_the_shape_of_a_product(
    learner_of: Callable[..., Learner], name: str, dtype: Dtype
) -> None:
    """As kernels do that are chosen by shape, on some CPUs and most GPUs: one unit of rounding more or less."""
    learner = learner_of(name, dtype)
    more = 1 + torch.finfo(learner._head.weight.dtype).eps

    def head(_: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output if output.ndim == 3 else output * more

    def body(_: Any, inputs: Any, options: Any, output: Any) -> Any:
        if options.get("attention_mask") is not None:
            output.last_hidden_state = output.last_hidden_state * more
        return output

    learner._head.register_forward_hook(head)
    learner._causal_lm.model.register_forward_hook(body, with_kwargs=True)
    prompt, completion = sequence(64)
    ours = learner._head(learner.hidden_states([prompt], [completion])[0])
    assert not torch.equal(ours, learner.logits(prompt, completion))
    learner.check_teacher_is_student(prompt, completion)


def nan_in_the_body(learner: Learner) -> None:
    with torch.no_grad():
        learner._causal_lm.model.norm.weight[0] = torch.nan


def used_adapter(learner: Learner) -> None:
    stir(learner, 0.02)


def merged_adapter(learner: Learner) -> None:
    stir(learner, 0.02)
    learner.model.merge_adapter()


def another_head(learner: Learner) -> None:
    """As of a head that is not tied to the weights that the model uses."""
    learner._head = copy.deepcopy(learner._head)
    with torch.no_grad():
        learner._head.weight.add_(torch.randn_like(learner._head.weight), alpha=0.01)


def scaled_before_the_head(learner: Learner) -> None:
    learner._head.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 0.8,))


def scaled_after_the_head(learner: Learner) -> None:
    forward = learner._causal_lm.forward

    def scaled(*arguments: Any, **options: Any) -> Any:
        output = forward(*arguments, **options)
        output.logits = output.logits * 1.02
        return output

    learner._causal_lm.forward = scaled


BROKEN = {
    nan_in_the_body: (NonFiniteError, "not finite"),
    used_adapter: (ConfigError, "differs from the fresh student"),
    merged_adapter: (ConfigError, "differs from the fresh student"),
    another_head: (ConfigError, "calls its output head 0 times"),
    scaled_before_the_head: (ConfigError, "changes its hidden states before the output head"),
    scaled_after_the_head: (ConfigError, "changes its logits after the output head"),
}


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.__name__)
def test_a_broken_model_is_refused_in_every_format(
    learner_of: Callable[..., Learner], broken: Callable[[Learner], None], dtype: Dtype
) -> None:
    for name in HEALTHY:
        learner = learner_of(name, dtype)
        broken(learner)
        error, said = BROKEN[broken]
        for length in (1, 64):
            with pytest.raises(error, match=said):
                learner.check_teacher_is_student(*sequence(length))


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("name", CHANGED_AFTER_THE_HEAD)
def test_models_with_changed_logits_are_refused(learner_of: Callable[..., Learner], name: str, dtype: Dtype) -> None:
    learner = learner_of(name, dtype)
    with pytest.raises(ConfigError, match="changes its logits after the output head"):
        learner.check_teacher_is_student(*sequence(64))


@pytest.mark.parametrize("dtype", FORMATS)
def test_a_teacher_without_a_context_teaches_nothing(learner_of: Callable[..., Learner], dtype: Dtype) -> None:
    """The loss is at its floor exactly, so that no step is made of rounding."""
    for name in HEALTHY:
        learner = learner_of(name, dtype)
        before = [parameter.clone() for parameter in learner.parameters]
        examples: list[Example] = []
        for length in LENGTHS:
            prompt, completion = sequence(length)
            examples.append(Example("r", prompt, prompt, completion, TokenGroups(length, None), truncated=False))
        metrics = learner.update(examples)
        assert (metrics.loss, metrics.kl_all_tokens, metrics.grad_norm) == (0.0, 0.0, 0.0)
        assert all(map(torch.equal, learner.parameters, before))


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("name", HEALTHY)
def test_the_solver_knows_the_trainers_policy_by_its_canary(
    learner_of: Callable[..., Learner], configure: Callable[..., Config], tmp_path: Path, name: str, dtype: Dtype
) -> None:
    """With other threads than the trainer, and in 32 bits merged. Another adapter, none or another base is found."""
    torch.set_num_threads(2)
    learner = learner_of(name, dtype)
    stir(learner, 0.2)
    learner.save_adapter(tmp_path / "published")
    weights = file_sha256(tmp_path / "published" / "adapter_model.safetensors")
    canary = measure_canary(learner, sequence(32))
    policy = PolicyVersion(version=1, path=str(tmp_path / "published"), sha256=weights, canary=canary)
    torch.set_num_threads(1)
    stir(learner, 0.2)
    learner.save_adapter(tmp_path / "another")
    config = configure(name, dtype)

    def check(adapter: Path | None, of: Config = config) -> None:
        model = load_policy(of.model, adapter, merge=dtype is Dtype.FLOAT32)
        found = Sampler(model, learner.tokenizer).logprobs(canary.prompt_token_ids, canary.completion_token_ids)
        verify_canary(policy, found, CANARY_TOLERANCE[dtype])

    check(tmp_path / "published")
    for adapter in (tmp_path / "another", None):
        with pytest.raises(PolicyError, match="canary log-probabilities that differ"):
            check(adapter)
    with pytest.raises(PolicyError, match="canary log-probabilities that differ"):
        check(None, configure(next(other for other in HEALTHY if other != name), dtype))


def test_rounding_of_one_token_is_no_other_adapter() -> None:
    """In 16 bits the logits of real models, 41 with SmolLM2, move single tokens by 0.3 nats, and the mean by 0.04."""
    canary = {"prompt_token_ids": [1], "completion_token_ids": [2] * 32, "logprobs": [-1.0] * 32}
    policy = PolicyVersion.model_validate({"version": 1, "path": "/a", "sha256": "0" * 64, "canary": canary})
    verify_canary(policy, [-1.3, *[-1.04] * 31], CANARY_TOLERANCE[Dtype.BFLOAT16])
    with pytest.raises(PolicyError):
        verify_canary(policy, [-1.2] * 32, CANARY_TOLERANCE[Dtype.BFLOAT16])
