"""What takes long to import in the processes of a run; the server that they are forked from imports it once."""

from __future__ import annotations

import peft
import transformers

import stepalign_critic.process
import stepalign_solver.worker
import stepalign_trainer.loop

IMPORTED = (peft, transformers, stepalign_critic.process, stepalign_solver.worker, stepalign_trainer.loop)
