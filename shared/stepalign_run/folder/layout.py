"""The run's folder: the third interface between the processes of a run, and the only place that names its files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ADAPTER_FILE = "adapter_model.safetensors"
"""In the folder of an adapter: its weights, by PEFT's name."""

REDIS_URL_FILE = "redis.url"
"""In the folder of an embedded Redis server: its address, which holds the password, while it runs."""

RUN_MARKER, COMPARISON_MARKER = ".stepalign-run", ".stepalign-comparison"
"""The first file in a folder of ours, by which it is known: :mod:`stepalign_run.folder.ownership`."""

RECORD_KEYS = frozenset({"fingerprint", "seed", "arm", "started_at", "threads"})
"""Of ``run.json``."""

_CHECKPOINT = "step-"


@dataclass(frozen=True)
class RunFolder:
    """The files of one run, by the names that this version writes and reads."""

    path: Path

    @property
    def record(self) -> Path:
        """The arm, the seed, the fingerprint and the start of the run, noted once by the trainer."""
        return self.path / "run.json"

    @property
    def metrics(self) -> Path:
        """A row for each update, by the trainer."""
        return self.path / "metrics.jsonl"

    @property
    def outcomes(self) -> Path:
        """A row for each update, by the trainer: ``{"step", "outcomes": {rollout_id: outcome}}``.

        Rollouts that no update used stand under step 0.
        """
        return self.path / "outcomes.jsonl"

    @property
    def published(self) -> Path:
        """A row for each event, by the solver: ``{"offered" | "admitted" | "duplicate": [rollout_id, …]}``.

        A group is offered before the queue is asked; the next row is the queue's answer.
        """
        return self.path / "published.jsonl"

    @property
    def tokens(self) -> Path:
        """The rollouts of the first and of the last update, token by token, by the trainer."""
        return self.path / "tokens.jsonl"

    @property
    def failure(self) -> Path:
        """The error that stopped the trainer."""
        return self.path / "failure.json"

    @property
    def evaluations(self) -> Path:
        """A row for each scored pair of policy version (``step``) and ``split``, by the evaluation."""
        return self.path / "evaluation.jsonl"

    @property
    def evaluation(self) -> Path:
        """The figures of a complete evaluation."""
        return self.path / "evaluation.json"

    @property
    def report(self) -> Path:
        """The report of a finished run: :class:`~stepalign_run.folder.report.Report`."""
        return self.path / "report.json"

    @property
    def page(self) -> Path:
        """The report as a page; a folder of several runs has one for all of them."""
        return self.path / "report.html"

    @property
    def comparison(self) -> Path:
        """The comparison of several runs, in the folder that holds theirs."""
        return self.path / "comparison.json"

    @property
    def critic_quality(self) -> Path:
        """A critic measured against people's labels, by ``stepalign critic-quality``."""
        return self.path / "critic_quality.json"

    @property
    def probe_plan(self) -> Path:
        """The plan of a probe."""
        return self.path / "probe_plan.json"

    @property
    def probe(self) -> Path:
        """The report of a probe."""
        return self.path / "probe.json"

    @property
    def adapters(self) -> Path:
        """The published adapters in PEFT's format. All are kept."""
        return self.path / "adapters"

    def adapter(self, version: int) -> Path:
        """The folder of the policy version ``version`` (from 1)."""
        return self.adapters / f"v{version:06d}"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"{_CHECKPOINT}{step:06d}"

    def checkpoints_by_step(self) -> dict[int, Path]:
        """All checkpoints, whole or not, the oldest first."""
        return {
            int(path.name.removeprefix(_CHECKPOINT)): path for path in sorted(self.checkpoints.glob(f"{_CHECKPOINT}*"))
        }

    @property
    def logs(self) -> Path:
        """The output of the processes that ``stepalign run`` starts, a file each."""
        return self.path / "logs"

    @property
    def redis(self) -> Path:
        """The folder of the embedded Redis server."""
        return self.path / "redis"

    @property
    def redis_url(self) -> Path:
        """The address of the embedded Redis server, while it runs."""
        return self.redis / REDIS_URL_FILE

    @property
    def critic_url(self) -> Path:
        """The address of the critic that ``stepalign run`` has started, while it runs."""
        return self.path / "critic.url"

    @property
    def trainer_lock(self) -> Path:
        """Held by the process that decides about the run's rollouts."""
        return self.path / ".trainer.lock"

    @property
    def lock(self) -> Path:
        """Held by a command that may replace the folder, and therefore beside it."""
        return self.path.parent / f".{self.path.name}.lock"

    @property
    def is_empty(self) -> bool:
        """Whether the folder is missing or holds nothing but its marker."""
        markers = (RUN_MARKER, COMPARISON_MARKER)
        return not self.path.exists() or all(path.name in markers for path in self.path.iterdir())
