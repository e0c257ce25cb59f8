"""The check of a loaded adapter: the log-probabilities of one fixed sequence.

A checksum proves that the file arrived, this that the model which samples holds it.
"""

from __future__ import annotations

from typing import Any

import torch

from stepalign.prompts import load_prompt, render_token_ids
from stepalign.prompts.content_tokens import content_token_ids
from stepalign_run.config import Config
from stepalign_run.policy_store import Canary
from stepalign_run.training_problems import load_training_problems
from stepalign_trainer.update.learner import Learner

_MOST_TOKENS = 32


def canary_sequence(config: Config, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Token ids of the first problem's prompt, and of the beginning of its solution or of its answer."""
    problem = min(load_training_problems(config), key=lambda each: each.id)
    messages = load_prompt(config.model.prompts, "student").fill(question=problem.question)
    prompt = render_token_ids(tokenizer, messages, **config.model.chat_template_options)
    solution = problem.reference_solution or problem.answer
    completion = content_token_ids(tokenizer, solution)
    return prompt, completion[:_MOST_TOKENS]


@torch.no_grad()
def measure_canary(learner: Learner, sequence: tuple[list[int], list[int]]) -> Canary:
    """The canary of the policy as it is now: adapter on, T = 1, natural logarithms."""
    prompt, completion = sequence
    logprobs = learner.logits(prompt, completion).float().log_softmax(-1)
    chosen = torch.tensor(completion, device=logprobs.device).unsqueeze(-1)
    values = logprobs.gather(-1, chosen).squeeze(-1).tolist()
    return Canary(prompt_token_ids=prompt, completion_token_ids=completion, logprobs=values)
