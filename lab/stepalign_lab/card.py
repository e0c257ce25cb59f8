"""The model card and the checksums of the lab's assets."""

from __future__ import annotations

from pathlib import Path

from stepalign_run.policy_store import file_sha256

CARD = """\
---
license: apache-2.0
library_name: transformers
tags: [toy, reasoning, self-distillation]
---

# The lab's models

Two tiny Llama models and three problem lists, made from seeds by `stepalign lab build` (seed {seed}). They exist so
that the whole loop runs for real on a CPU; they are of no use outside it.

Domain: chains of four to six operations on digits (`3 + 4 * 7 - 2`), evaluated from left to right, every result modulo
10, solved as step-tagged text over a word-level vocabulary.

| | `solver/` | `critic/` |
|---|---|---|
| architecture | Llama, hidden 96, 3 layers, 4 heads, tied embeddings, 0.34 M parameters | the same |
| vocabulary | 52 words and control tokens | 56: four step marks more |
| reads | a question, alone or with a critique or a reference solution | question, reference solution, attempt |
| writes | a step-tagged solution | the step-aligned critique, marks and verdict |
| trained on | 2,250 steps of 48 synthetic documents | 2,500 steps of 32 synthetic attempts |

The solver has learned a wrong result for 60 of the 300 digit facts and writes it 99.5 % of the time. It has also
learned to follow a context without learning the facts in it. The critic is frozen.

`problems/`: 500 training, 60 validation and 60 test problems, disjoint, all from the solver's hard band: solved fewer
than 5 times in 16 at T = 1.1. {never:.0%} of them were never solved.

## Measured when they were built

On 400 chains of their own; attempts are the solver's rollouts at T = 1.1, every fourth one cut at a random token.

| | share |
|---|---|
| solver right with a critique in its own wording as context, greedy | {teacher_right_own_wording:.4f} |
| solver right with a reference solution as context, greedy | {teacher_right_reference_wording:.4f} |
| critiques that validate | {critiques_valid:.4f} |
| critiques that are exactly right | {critiques_exact:.4f} |
| critiques of cut attempts that are exactly right | {critiques_exact_truncated:.4f} |

Limits: the critic was trained for attempts like these; on attempts with corrupted tokens and missing steps it is often
wrong, and its critique is then refused.
"""


def write_card(directory: Path, figures: dict[str, float], seed: int) -> None:
    text = CARD.format(seed=seed, never=figures["band_never_solved"], **figures)
    (directory / "README.md").write_text(text, encoding="utf-8")


def write_checksums(directory: Path) -> None:
    """``SHA256SUMS`` over the models, problems, card and figures, in the format of ``sha256sum -c``."""
    shipped = [path for path in directory.rglob("*") if path.is_file() and path.suffix != ".toml"]
    files = sorted(path for path in shipped if path.name != "SHA256SUMS")
    lines = [f"{file_sha256(path)}  {path.relative_to(directory).as_posix()}\n" for path in files]
    (directory / "SHA256SUMS").write_text("".join(lines), encoding="utf-8")
