"""Slow imports of a run's processes; the server that they are forked from does them once."""

from __future__ import annotations

import peft
import transformers

import stepalign_critic.process
import stepalign_solver.worker
import stepalign_trainer.loop

IMPORTED = (peft, transformers, stepalign_critic.process, stepalign_solver.worker, stepalign_trainer.loop)
