"""The update: student forward, teacher forward with the adapter off, loss, backward, AdamW."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from stepalign.config import Config
from stepalign.devices import choose_device
from stepalign.errors import ConfigError
from stepalign_trainer.divergence import TokenTerms, token_terms
from stepalign_trainer.examples import Example


@dataclass(frozen=True)
class UpdateMetrics:
    """Figures of one update. Advantages and KL in nats, lengths in tokens; None where no token was in the group.

    Without a critique no token is known to be correct, and the advantages by group are None.
    """

    loss: float
    kl_all_tokens: float | None
    advantage_correct: float | None
    advantage_correct_below: float | None
    """Share of the tokens before the first error whose advantage is below −0.1."""
    advantage_at_error: float | None
    advantage_after_error: float | None
    first_token_kl: float | None
    entropy: float | None
    mean_tokens: float
    truncated: float
    grad_norm: float
    trained_rollouts: int
    tokens: int
    tokens_in_scope: int
    update_seconds: float
    tokens_per_second: float

    def as_row(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class _Gathered:
    """Per-token values of a whole batch, on the CPU."""

    kl: list[torch.Tensor] = field(default_factory=list)
    entropy: list[torch.Tensor] = field(default_factory=list)
    correct: list[torch.Tensor] = field(default_factory=list)
    at_error: list[torch.Tensor] = field(default_factory=list)
    after_error: list[torch.Tensor] = field(default_factory=list)
    first_kl: list[torch.Tensor] = field(default_factory=list)
    loss: float = 0.0

    def add(self, example: Example, terms: TokenTerms) -> None:
        advantage = terms.advantage.cpu()
        kl = terms.kl.detach().cpu()
        error = example.groups.first_error
        self.kl.append(kl)
        self.first_kl.append(kl[:1])
        self.entropy.append(terms.entropy.cpu())
        if example.groups.aligned:
            self.correct.append(advantage[:error])
        if error is not None:
            self.at_error.append(advantage[error : error + 1])
            self.after_error.append(advantage[error + 1 :])


def _mean(parts: list[torch.Tensor]) -> float | None:
    values = torch.cat(parts) if parts else torch.empty(0)
    return values.mean().item() if values.numel() else None


class Learner:
    """The trainable policy: base model, LoRA adapter, optimizer.

    The teacher is the same model with the adapter switched off, so no second copy exists. That holds only while nothing
    is merged and nothing drops out; :meth:`check_teacher_is_student` asserts it before the first update.
    """

    def __init__(self, config: Config, tokenizer: Any) -> None:
        self.config = config
        self.tokenizer = tokenizer
        settings = config.model
        self.device = torch.device(
            choose_device(settings.device, cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available())
        )
        if not (settings.path / "config.json").is_file():
            raise ConfigError(f"model.path {settings.path}: there is no model there (config.json is missing)")
        self._check_positions()
        torch.manual_seed(config.run.seed)
        base = AutoModelForCausalLM.from_pretrained(
            settings.path, dtype=getattr(torch, settings.dtype.value), local_files_only=True, use_safetensors=True
        )
        lora = LoraConfig(
            r=config.trainer.lora.rank,
            lora_alpha=config.trainer.lora.alpha,  # pyright: ignore[reportArgumentType]
            target_modules=list(config.trainer.lora.target_modules),
            lora_dropout=0.0,
            task_type="CAUSAL_LM",
        )
        self.model: PeftModel = get_peft_model(base, lora).to(self.device)  # pyright: ignore[reportAttributeAccessIssue]
        self.model.eval()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=config.trainer.learning_rate, weight_decay=0.0)
        self._causal_lm: Any = self.model.get_base_model()
        self._head = self._causal_lm.get_output_embeddings()

    def _check_positions(self) -> None:
        """Raises ConfigError when the budgets allow a sequence that is longer than the model's positions."""
        config = self.config
        positions = getattr(AutoConfig.from_pretrained(config.model.path), "max_position_embeddings", None)
        prompt = max(config.solver.max_prompt_tokens, config.trainer.max_teacher_prompt_tokens)
        if positions is not None and prompt + config.solver.max_new_tokens > positions:
            raise ConfigError(
                f"a prompt of {prompt} tokens and solver.max_new_tokens = {config.solver.max_new_tokens} exceed the "
                f"model's {positions} positions; lower solver.max_prompt_tokens, trainer.max_teacher_prompt_tokens or "
                "solver.max_new_tokens"
            )

    @contextmanager
    def teacher(self) -> Iterator[None]:
        """The initial policy: adapter off, no gradients. The adapter is on again afterwards, whatever happens."""
        with torch.no_grad(), self.model.disable_adapter():
            yield

    def hidden_states(self, prompts: Sequence[list[int]], completions: Sequence[list[int]]) -> list[torch.Tensor]:
        """Hidden states ``[T_i, H]`` at the positions that predict each completion's tokens.

        Sequences are padded on the right: under causal attention no real token ever sees padding.
        """
        rows = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        width = max(map(len, rows))
        input_ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=self.device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=self.device)
        hidden = self._causal_lm.model(input_ids=input_ids, attention_mask=mask, use_cache=False).last_hidden_state
        return [
            hidden[i, len(prompt) - 1 : len(prompt) - 1 + len(completion)]
            for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        ]

    def logits(self, prompt: list[int], completion: list[int]) -> torch.Tensor:
        """Logits ``[T, V]`` of the completion's tokens, through the model's own forward."""
        input_ids = torch.tensor([prompt + completion], device=self.device)
        return self.model(input_ids=input_ids).logits[0, len(prompt) - 1 : -1]

    @torch.no_grad()
    def check_teacher_is_student(self, prompt: list[int], completion: list[int]) -> None:
        """Assert, before the first update, what the method rests on. Raises ConfigError when it does not hold.

        Without a context the teacher equals the student bit for bit, and the output head on hidden states gives the
        model's own logits (it would not with soft-capped or scaled logits).
        """
        student = self.logits(prompt, completion)
        with self.teacher():
            teacher = self.logits(prompt, completion)
        if not torch.equal(student, teacher):
            raise ConfigError("with the adapter off the model differs from the fresh student: is an adapter merged?")
        from_hidden = self._head(self.hidden_states([prompt], [completion])[0])
        if not torch.allclose(from_hidden.float(), student.float(), atol=1e-3, rtol=1e-3):
            raise ConfigError("this model changes its logits after the output head (soft cap or scale): not supported")

    def update(self, examples: Sequence[Example]) -> UpdateMetrics:
        """One AdamW step on the mean KL over the tokens in scope of all examples. Without examples nothing changes.

        Raises FloatingPointError on values that are not finite, before the weights are touched.
        """
        started = time.monotonic()
        in_scope = sum(example.groups.in_scope for example in examples)
        gathered = _Gathered()
        self.optimizer.zero_grad(set_to_none=True)
        size = self.config.trainer.micro_batch
        for start in range(0, len(examples), size):
            self._accumulate(examples[start : start + size], in_scope, gathered)
        norm = 0.0
        if in_scope:
            norm_tensor = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.trainer.max_grad_norm)
            if not torch.isfinite(norm_tensor):
                raise FloatingPointError("the gradient is not finite; the update was not applied")
            norm = norm_tensor.item()
            self.optimizer.step()
        return self._metrics(examples, gathered, in_scope, norm, time.monotonic() - started)

    def _accumulate(self, examples: Sequence[Example], in_scope: int, gathered: _Gathered) -> None:
        completions = [example.completion for example in examples]
        with self.teacher():
            teacher = self.hidden_states([example.teacher_prompt for example in examples], completions)
        student = self.hidden_states([example.student_prompt for example in examples], completions)
        targets = torch.tensor([token for tokens in completions for token in tokens], device=self.device)
        terms = token_terms(
            torch.cat(student), torch.cat(teacher), targets, self._head, self.config.trainer.logit_chunk
        )
        lengths = [len(tokens) for tokens in completions]
        pieces = [torch.split(values, lengths) for values in (terms.kl, terms.advantage, terms.entropy)]
        loss = torch.zeros((), device=self.device)
        for example, kl, advantage, entropy in zip(examples, *pieces, strict=True):
            loss = loss + kl[: example.groups.in_scope].sum()
            gathered.add(example, TokenTerms(kl=kl, advantage=advantage, entropy=entropy))
        loss = loss / max(in_scope, 1)
        loss.backward()
        gathered.loss += loss.item()

    def _metrics(
        self, examples: Sequence[Example], gathered: _Gathered, in_scope: int, norm: float, seconds: float
    ) -> UpdateMetrics:
        tokens = sum(len(example.completion) for example in examples)
        count = max(len(examples), 1)
        below = [(values < -0.1).float() for values in gathered.correct]
        return UpdateMetrics(
            loss=gathered.loss,
            kl_all_tokens=_mean(gathered.kl),
            advantage_correct=_mean(gathered.correct),
            advantage_correct_below=_mean(below),
            advantage_at_error=_mean(gathered.at_error),
            advantage_after_error=_mean(gathered.after_error),
            first_token_kl=_mean(gathered.first_kl),
            entropy=_mean(gathered.entropy),
            mean_tokens=tokens / count,
            truncated=sum(example.truncated for example in examples) / count,
            grad_norm=norm,
            trained_rollouts=len(examples),
            tokens=tokens,
            tokens_in_scope=in_scope,
            update_seconds=seconds,
            tokens_per_second=tokens / seconds if seconds else 0.0,
        )

    def save_adapter(self, directory: Path) -> None:
        """Write the adapter in PEFT's format (safetensors)."""
        self.model.save_pretrained(str(directory), safe_serialization=True)
