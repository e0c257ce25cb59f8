"""The update: student forward, teacher forward with the adapter off, the arm's loss, backward, AdamW."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from stepalign.errors import ConfigError, NonFiniteError
from stepalign_models.devices import choose_device
from stepalign_run.config import Config
from stepalign_trainer.batch.examples import Example, ModelLimits
from stepalign_trainer.objectives import make_objective
from stepalign_trainer.objectives.divergence import Predictions, TokenLoss, TokenTerms, token_terms
from stepalign_trainer.update.metrics import BatchTerms, Step, UpdateMetrics, update_metrics


def _nothing(predictions: Predictions, tokens: slice) -> torch.Tensor:
    return torch.zeros_like(predictions.kl)


class Learner:
    """The trainable policy: base model, LoRA adapter, optimizer.

    The teacher is the same model with the adapter switched off, so no second copy exists. That holds only while nothing
    is merged and nothing drops out; :meth:`check_teacher_is_student` asserts it before the first update.
    """

    def __init__(self, config: Config, tokenizer: Any) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.objective = make_objective(config.arm)
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
        positions = self._check_positions()
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
        embedded = self._causal_lm.get_input_embeddings().weight.shape[0]
        self.limits = ModelLimits(min(embedded, self._head.weight.shape[0]), positions)

    def _check_positions(self) -> int | None:
        """The model's positions. Raises ConfigError when the budgets allow a sequence that is longer."""
        config = self.config
        positions = getattr(AutoConfig.from_pretrained(config.model.path), "max_position_embeddings", None)
        prompt = max(config.solver.max_prompt_tokens, config.trainer.max_teacher_prompt_tokens)
        if positions is not None and prompt + config.solver.max_new_tokens > positions:
            raise ConfigError(
                f"a prompt of {prompt} tokens and solver.max_new_tokens = {config.solver.max_new_tokens} exceed the "
                f"model's {positions} positions; lower solver.max_prompt_tokens, trainer.max_teacher_prompt_tokens or "
                "solver.max_new_tokens"
            )
        return positions

    @contextmanager
    def teacher(self) -> Iterator[None]:
        """The initial policy: adapter off, no gradients. The adapter is on again afterwards, also after an error."""
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
        """Assert the method's premises before the first update. Raises ConfigError when one does not hold, and
        NonFiniteError on logits that are not finite.

        - Without a context the teacher equals the student bit for bit: a fresh adapter adds zeros to the same products.
        - Logits are what the output head gives, bit for bit: those of one call of it are compared, not computed again
          (a soft cap or a scale would show).
        - The head reads the hidden states that the loss is computed from. These come of another call, for which a
          library may choose another kernel: equal to half of the number format's digits.
        """
        read, given, student = self._through_the_head(prompt, completion)
        with self.teacher():
            _, _, teacher = self._through_the_head(prompt, completion)
        if not torch.isfinite(student).all():
            raise NonFiniteError("the logits of the fresh model are not finite")
        if not torch.equal(student, teacher):
            raise ConfigError("with the adapter off the model differs from the fresh student: is an adapter merged?")
        if not torch.equal(given.float(), student.float()):
            raise ConfigError("this model changes its logits after the output head (soft cap or scale): not supported")
        ours = self.hidden_states([prompt], [completion])[0].float()
        theirs = read[0, len(prompt) - 1 : -1].float()
        if not (ours - theirs).norm() <= math.sqrt(torch.finfo(read.dtype).eps) * theirs.norm():
            raise ConfigError("this model changes its hidden states before the output head (a scale): not supported")

    def _through_the_head(
        self, prompt: list[int], completion: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of one forward pass: what the output head reads, ``[1, L, H]``, what it gives and what the model gives,
        ``[1, L, V]``. Raises ConfigError for a model that does not use the head once."""
        calls: list[tuple[torch.Tensor, torch.Tensor]] = []
        watched = self._head.register_forward_hook(lambda _, inputs, output: calls.append((inputs[0], output)))
        try:
            logits = self.model(input_ids=torch.tensor([prompt + completion], device=self.device)).logits
        finally:
            watched.remove()
        if len(calls) != 1:
            raise ConfigError(f"this model calls its output head {len(calls)} times a pass and not once: not supported")
        return *calls[0], logits

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
        weights = self.objective.weights(examples)
        in_scope = sum(int((w != 0).sum()) for w in weights)
        first, norm, stepped = self._accumulate_all(examples, weights, None), 0.0, False
        last = first
        for iteration in range(self.objective.iterations if in_scope else 0):
            if iteration:
                last = self._accumulate_all(examples, weights, first)
            if last.loss != self.objective.floor:
                norm_of_step = self._step()
                norm, stepped = norm if iteration else norm_of_step, True
        if stepped:
            self._check_policy(min(examples, key=lambda example: len(example.completion)))
        step = Step(in_scope, norm, time.monotonic() - started)
        return update_metrics(examples, first, step, self.objective.columns(examples, first.of, last.of))

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
        self, examples: Sequence[Example], weights: Sequence[torch.Tensor], first: BatchTerms | None
    ) -> BatchTerms:
        """Gradients of the whole batch. ``first`` are the values before the first optimizer step, None in it."""
        self.optimizer.zero_grad(set_to_none=True)
        found = BatchTerms()
        size = self.config.trainer.micro_batch
        for start in range(0, len(examples), size):
            part = slice(start, start + size)
            old = None
            if first is not None and self.objective.needs.old_logprobs:
                old = torch.cat([terms.logprob for terms in first.of[part]]).to(self.device)
            self.objective.begin(examples[part], old)
            self._accumulate(examples[part], weights[part], found)
        return found

    def _accumulate(self, examples: Sequence[Example], weights: Sequence[torch.Tensor], found: BatchTerms) -> None:
        completions = [example.completion for example in examples]
        with self.teacher():
            teacher = self.hidden_states([example.teacher_prompt for example in examples], completions)
        student = self.hidden_states([example.student_prompt for example in examples], completions)
        targets = torch.tensor([token for tokens in completions for token in tokens], device=self.device)
        try:
            terms = self._terms(student, teacher, targets, self.objective.token_loss, self.objective.signal)
        except NonFiniteError as error:
            among = ", ".join(example.rollout_id for example in examples)
            raise NonFiniteError(f"{error}, in one of the rollouts {among}") from None
        loss = (terms.loss * torch.cat(list(weights)).to(self.device)).sum()
        loss.backward()
        found.loss += loss.item()
        lengths = [len(tokens) for tokens in completions]
        values = {name: torch.split(value.detach().cpu(), lengths) for name, value in vars(terms).items()}
        found.of += [TokenTerms(**{name: parts[i] for name, parts in values.items()}) for i in range(len(examples))]

    def _terms(
        self,
        student: Sequence[torch.Tensor],
        teacher: Sequence[torch.Tensor],
        targets: torch.Tensor,
        token_loss: TokenLoss,
        signal: TokenLoss,
    ) -> TokenTerms:
        return token_terms(
            torch.cat(list(student)),
            torch.cat(list(teacher)),
            targets,
            self._head,
            self.config.trainer.logit_chunk,
            token_loss,
            signal,
        )

    @torch.no_grad()
    def token_values(self, student_prompt: list[int], teacher_prompt: list[int], completion: list[int]) -> TokenTerms:
        """Divergences and advantages of a teacher prompt on a completion, for every arm: ``loss`` and
        ``signal`` are 0, and nothing is trained."""
        with self.teacher():
            teacher = self.hidden_states([teacher_prompt], [completion])
        student = self.hidden_states([student_prompt], [completion])
        targets = torch.tensor(completion, device=self.device)
        return self._terms(student, teacher, targets, _nothing, _nothing)

    def save_adapter(self, directory: Path) -> None:
        """Write the adapter in PEFT's format (safetensors)."""
        self.model.save_pretrained(str(directory), safe_serialization=True)
