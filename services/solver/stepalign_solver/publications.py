"""The solver's offers to the queue and the queue's answers: ``published.jsonl`` in the run's folder.

Two rows a group. The first is written before the queue is asked, so that a kill between admission and the second one
hides nothing: an audit asks the queue whether such a group was admitted.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from stepalign.errors import JournalError
from stepalign_run.folder.jsonl import end_at_a_whole_row
from stepalign_run.folder.layout import RunFolder
from stepalign_run.queue import Admission
from stepalign_run.rollout import Rollout


class PublicationJournal:
    """Appends to the file. A row that a kill has cut short is removed first, so that it spoils no other.

    Raises JournalError where the disk has no room.
    """

    def __init__(self, run_dir: Path) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self._path = RunFolder(run_dir).published
        end_at_a_whole_row(self._path)

    def offer(self, group: Sequence[Rollout]) -> None:
        """The queue is about to be asked."""
        self._append(json.dumps({"offered": [rollout.rollout_id for rollout in group]}))

    def answered(self, group: Sequence[Rollout], admission: Admission) -> None:
        """The queue has answered."""
        self._append(json.dumps({admission.value: [rollout.rollout_id for rollout in group]}))

    def sync(self) -> None:
        """Sync the rows to the disk, so that a power cut spares them."""
        with self._path.open("rb") as file:
            os.fsync(file.fileno())

    def _append(self, line: str) -> None:
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise JournalError(
                f"{self._path} cannot be written ({error.strerror}); make room, then --resume: nothing is lost"
            ) from error
