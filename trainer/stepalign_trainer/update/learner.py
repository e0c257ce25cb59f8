"""The update: student forward, teacher forward with the adapter off, the arm's loss, backward, AdamW."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from stepalign.errors import ConfigError, NonFiniteError
from stepalign_models.devices import choose_device
from stepalign_run.config import Config
from stepalign_trainer.batch.examples import Example
from stepalign_trainer.objectives import ForwardKl, Grpo, Objective, make_objective
from stepalign_trainer.objectives.divergence import TokenTerms, token_terms


@dataclass(frozen=True)
class UpdateMetrics:
    """Figures of one update. Advantages and KL in nats, lengths in tokens; None where no token was in the group.

    Without a critique and without a checker no token is known to be correct, and the advantages by group are None.
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
    signal_share: float | None
    """Share of the tokens in scope that the objective pushes somewhere."""
    update_seconds: float
    tokens_per_second: float
    kl_to_base: float | None = None
    """``KL(student ‖ base)``, mean over all tokens (GRPO)."""
    clip_fraction: float | None = None
    """Share of tokens whose ratio was clipped in the last of ``num_iterations`` (GRPO)."""

    def as_row(self) -> dict[str, Any]:
        only_grpo = ("kl_to_base", "clip_fraction")
        return {key: value for key, value in asdict(self).items() if value is not None or key not in only_grpo}


@dataclass
class _Gathered:
    """Per-token values of a whole batch before the first optimizer step, on the CPU."""

    kl: list[torch.Tensor] = field(default_factory=list)
    reverse_kl: list[torch.Tensor] = field(default_factory=list)
    entropy: list[torch.Tensor] = field(default_factory=list)
    signal: list[torch.Tensor] = field(default_factory=list)
    logprob: list[torch.Tensor] = field(default_factory=list)
    correct: list[torch.Tensor] = field(default_factory=list)
    at_error: list[torch.Tensor] = field(default_factory=list)
    after_error: list[torch.Tensor] = field(default_factory=list)
    first_kl: list[torch.Tensor] = field(default_factory=list)
    loss: float = 0.0

    def add(self, example: Example, terms: TokenTerms) -> None:
        advantage = terms.advantage
        error = example.groups.first_error
        self.kl.append(terms.kl)
        self.reverse_kl.append(terms.reverse_kl)
        self.first_kl.append(terms.kl[:1])
        self.entropy.append(terms.entropy)
        self.signal.append(terms.signal[: example.groups.in_scope])
        self.logprob.append(terms.logprob)
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
            choose_device(
                settings.device,
                cuda=torch.cuda.is_available(),
                mps=torch.backends.mps.is_available(),
                xpu=torch.xpu.is_available(),
            )
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
        """Assert, before the first update, what the method rests on. Raises ConfigError when it does not hold, and
        NonFiniteError on logits that are not finite.

        Without a context the teacher equals the student bit for bit, and the output head on hidden states gives the
        model's own logits (it would not with soft-capped or scaled logits).
        """
        student = self.logits(prompt, completion)
        with self.teacher():
            teacher = self.logits(prompt, completion)
        if not torch.isfinite(student).all():
            raise NonFiniteError("the logits of the fresh model are not finite")
        if not torch.equal(student, teacher):
            raise ConfigError("with the adapter off the model differs from the fresh student: is an adapter merged?")
        from_hidden = self._head(self.hidden_states([prompt], [completion])[0])
        if not torch.allclose(from_hidden.float(), student.float(), atol=1e-3, rtol=1e-3):
            raise ConfigError("this model changes its logits after the output head (soft cap or scale): not supported")

    def update(self, examples: Sequence[Example]) -> UpdateMetrics:
        """The arm's optimizer steps on one batch.

        Nothing changes without a token in scope, nor where the loss is as low as it can be: the gradient is then
        rounding, which AdamW would make whole steps of.

        The figures are those of the first step. Raises NonFiniteError on values that are not finite; weights and
        optimizer are then those from before the update.
        """
        started = time.monotonic()
        before = self._snapshot()
        try:
            return self._update(examples, started)
        except NonFiniteError:
            self._restore(before)
            raise

    def _update(self, examples: Sequence[Example], started: float) -> UpdateMetrics:
        objective = make_objective(self.config.arm)
        weights = objective.weights(examples)
        in_scope = sum(int((w != 0).sum()) for w in weights)
        gathered, clipped = _Gathered(), None
        norm, stepped = 0.0, False
        for iteration in range(objective.iterations if in_scope else 1):
            first = iteration == 0
            last = gathered if first else _Gathered()
            clipped = self._accumulate_all(objective, examples, weights, last, None if first else gathered.logprob)
            if in_scope and last.loss != objective.floor:
                norm_of_step = self._step()
                norm, stepped = norm_of_step if first else norm, True
        if stepped:
            self._check_policy(min(examples, key=lambda example: len(example.completion)))
        return self._metrics(examples, gathered, in_scope, norm, time.monotonic() - started, clipped)

    @torch.no_grad()
    def _check_policy(self, example: Example) -> None:
        """Look at the new policy before anybody else does: the next to run it is the solver, after the checkpoint."""
        finite = all(bool(torch.isfinite(parameter).all()) for parameter in self.parameters)
        hidden = self.hidden_states([example.student_prompt], [example.completion])[0]
        if not finite or not torch.isfinite(self._head(hidden).float().log_softmax(-1)).all():
            raise NonFiniteError("the policy after the update is not finite")

    def _snapshot(self) -> tuple[list[torch.Tensor], dict[str, Any]]:
        weights = [parameter.detach().clone() for parameter in self.parameters]
        return weights, copy.deepcopy(self.optimizer.state_dict())

    def _restore(self, before: tuple[list[torch.Tensor], dict[str, Any]]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self.parameters, before[0], strict=True):
                parameter.copy_(value)
        self.optimizer.load_state_dict(before[1])

    def _step(self) -> float:
        """Clip the gradient and apply it. Returns its norm before clipping."""
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.trainer.max_grad_norm)
        if not torch.isfinite(norm):
            raise NonFiniteError("the gradient is not finite")
        self.optimizer.step()
        return norm.item()

    def _accumulate_all(
        self,
        objective: Objective,
        examples: Sequence[Example],
        weights: Sequence[torch.Tensor],
        gathered: _Gathered,
        old: Sequence[torch.Tensor] | None,
    ) -> float | None:
        """Gradients of the whole batch. Returns the share of clipped tokens, None where nothing can be clipped."""
        self.optimizer.zero_grad(set_to_none=True)
        size = self.config.trainer.micro_batch
        clipped: list[torch.Tensor] = []
        for start in range(0, len(examples), size):
            part = slice(start, start + size)
            old_logprobs = None if old is None else torch.cat(list(old[part])).to(self.device)
            objective.begin(examples[part], old_logprobs)
            self._accumulate(objective, examples[part], weights[part], gathered)
            if isinstance(objective, Grpo):
                clipped.append(objective.clipped(torch.cat(gathered.logprob[part]).to(self.device)))
        return _mean(clipped)

    def _accumulate(
        self,
        objective: Objective,
        examples: Sequence[Example],
        weights: Sequence[torch.Tensor],
        gathered: _Gathered,
    ) -> None:
        completions = [example.completion for example in examples]
        with self.teacher():
            teacher = self.hidden_states([example.teacher_prompt for example in examples], completions)
        student = self.hidden_states([example.student_prompt for example in examples], completions)
        targets = torch.tensor([token for tokens in completions for token in tokens], device=self.device)
        try:
            terms = self._terms(objective, student, teacher, targets)
        except NonFiniteError as error:
            among = ", ".join(example.rollout_id for example in examples)
            raise NonFiniteError(f"{error}, in one of the rollouts {among}") from None
        loss = (terms.loss * torch.cat(list(weights)).to(self.device)).sum()
        loss.backward()
        gathered.loss += loss.item()
        lengths = [len(tokens) for tokens in completions]
        values = {name: torch.split(value.detach().cpu(), lengths) for name, value in vars(terms).items()}
        for i, example in enumerate(examples):
            gathered.add(example, TokenTerms(**{name: parts[i] for name, parts in values.items()}))

    def _terms(
        self,
        objective: Objective,
        student: Sequence[torch.Tensor],
        teacher: Sequence[torch.Tensor],
        targets: torch.Tensor,
    ) -> TokenTerms:
        return token_terms(
            torch.cat(list(student)),
            torch.cat(list(teacher)),
            targets,
            self._head,
            self.config.trainer.logit_chunk,
            objective.token_loss,
            objective.signal,
        )

    @torch.no_grad()
    def token_values(self, student_prompt: list[int], teacher_prompt: list[int], completion: list[int]) -> TokenTerms:
        """What a teacher prompt says of each token of a completion; nothing is trained."""
        with self.teacher():
            teacher = self.hidden_states([teacher_prompt], [completion])
        student = self.hidden_states([student_prompt], [completion])
        return self._terms(ForwardKl(), student, teacher, torch.tensor(completion, device=self.device))

    def _metrics(
        self,
        examples: Sequence[Example],
        gathered: _Gathered,
        in_scope: int,
        norm: float,
        seconds: float,
        clipped: float | None,
    ) -> UpdateMetrics:
        tokens = sum(len(example.completion) for example in examples)
        count = max(len(examples), 1)
        below = [(values < -0.1).float() for values in gathered.correct]
        grpo = self.config.arm.objective == "grpo"
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
            signal_share=_mean(gathered.signal),
            update_seconds=seconds,
            tokens_per_second=tokens / seconds if seconds else 0.0,
            kl_to_base=_mean(gathered.reverse_kl) if grpo else None,
            clip_fraction=clipped if grpo else None,
        )

    def save_adapter(self, directory: Path) -> None:
        """Write the adapter in PEFT's format (safetensors)."""
        self.model.save_pretrained(str(directory), safe_serialization=True)
