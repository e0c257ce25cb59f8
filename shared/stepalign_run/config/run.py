"""The whole configuration of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from stepalign_run.config.arm import ArmSection
from stepalign_run.config.base import DEVICE, Dtype, Section, TemplateOptions
from stepalign_run.config.critic import RunCriticSection
from stepalign_run.config.graders import AUTO, DEFAULT_PROMPTS, with_run_graders
from stepalign_run.config.solver import EvaluationSection, SolverSection
from stepalign_run.config.trainer import AlarmsSection, TrainerSection
from stepalign_run.fields import ArmName, RunName, RunSeed
from stepalign_run.folder.layout import RunFolder
from stepalign_run.folder.ownership import OwnFolder


class RunSection(Section):
    """The identity of a run, and its place."""

    name: RunName = "run"
    """Name of the run; its files go to ``dir/name`` and its Redis keys under its name."""
    dir: Path = Path("runs")
    """Folder of all runs."""
    seed: RunSeed = 0
    """Seed of problem order, sampling and adapter initialisation."""
    arm: ArmName = "stepalign_scoped"
    """The experimental condition: one of the arms that are shipped (configs/arms), or the path of an arm's file."""
    heartbeat_file: Path | None = None
    """A file that solver, trainer and evaluation touch while they work, for a health check in a container."""


class ModelSection(Section):
    """The solver model, which is trained."""

    path: Path
    """Folder of the solver model: safetensors, tokenizer, config.json."""
    prompts: str = DEFAULT_PROMPTS
    """Prompt set of the student and the teacher."""
    device: Annotated[str, Field(pattern=DEVICE)] = "auto"
    """A torch device, or ``auto``: CUDA, then MPS, then CPU."""
    dtype: Dtype = Dtype.FLOAT32
    """Number format of the weights."""
    chat_template_options: TemplateOptions = Field(default_factory=dict)
    """Options of the chat template for the student, such as ``enable_thinking = false``."""
    teacher_chat_template_options: TemplateOptions = Field(default_factory=dict)
    """Options of the chat template for the teacher, with any context; empty, they are the student's."""


class DataSection(Section):
    """The problems, and how their answers are judged."""

    train: Path
    """Problems to train on: JSON Lines, a JSON array, Parquet, or a folder of such files."""
    validation: Path | None = None
    """Problems that pick the checkpoint."""
    test: Path | None = None
    """Problems of the reported figures."""
    grader: str = AUTO
    """How answers are compared: a name in the group ``stepalign.graders``. ``exact``: as numbers, else as text.
    ``math``: by what they mean, LaTeX too. ``auto``: ``math`` beside ``model.prompts`` that begin with ``chat``, else
    ``exact``."""
    checker: str | None = None
    """An exact checker of these problems, a name in the group ``stepalign.checkers``. It serves figures only: the share
    of traces in which every step is right, and where the first error is in arms without a critic."""
    answer_choices: Annotated[int, Field(ge=2)] | None = None
    """How many answers a guesser chooses from; the report then shows the figures of chance."""


class QueueSection(Section):
    """The queue that carries rollouts from the solver to the trainer."""

    redis_url: str | None = None
    """A Redis (≥ 7.0) or Valkey server. Unset, ``stepalign run`` starts the embedded one."""
    redis_password_file: Path | None = None
    """A file that holds the server's password, for a ``redis_url`` without one."""
    reconnect_seconds: Annotated[float, Field(ge=0)] = 3.0
    """About how long a command is tried again while the server does not answer, as when it restarts."""
    capacity: Annotated[int, Field(ge=1)] = 256
    """Most rollouts in the queue, claimed ones included; a producer waits above it."""
    claim_idle_seconds: Annotated[float, Field(gt=0)] = 60.0
    """A claimed rollout whose consumer gave no sign of life for so long goes to another consumer."""
    max_deliveries: Annotated[int, Field(ge=1)] = 5
    """Deliveries after which a rollout goes to the dead letters."""
    max_entry_bytes: Annotated[int, Field(ge=1024, le=512 * 2**20)] = 4 * 2**20
    """Largest encoded rollout; Redis takes no value over 512 MiB."""


class Config(Section):
    """The whole configuration of a run. Read it with ``load_config``."""

    run: RunSection = RunSection()
    model: ModelSection
    data: DataSection
    queue: QueueSection = QueueSection()
    critic: RunCriticSection
    solver: SolverSection = SolverSection()
    trainer: TrainerSection = TrainerSection()
    evaluation: EvaluationSection = EvaluationSection()
    arm: ArmSection = ArmSection()
    alarms: AlarmsSection = AlarmsSection()

    @model_validator(mode="before")
    @classmethod
    def _one_judge(cls, values: Any) -> Any:
        return with_run_graders(values)

    @model_validator(mode="after")
    def _queue_holds_what_two_checkpoints_need(self) -> Config:
        """Rollouts stay in the queue until a second checkpoint holds them."""
        needed = 2 * self.trainer.batch * self.trainer.checkpoint_every
        if self.queue.capacity < needed:
            raise ValueError(
                f"queue.capacity is {self.queue.capacity}; it must be at least 2 × trainer.batch × "
                f"trainer.checkpoint_every = {needed}, or the solver and the trainer wait for each other"
            )
        return self

    @model_validator(mode="after")
    def _merging_is_exact(self) -> Config:
        if self.solver.merge_adapter and self.model.dtype is not Dtype.FLOAT32:
            raise ValueError("solver.merge_adapter rounds small adapters away in 16 bits; set it to false")
        return self

    @model_validator(mode="after")
    def _groups_fill_batches(self) -> Config:
        if self.trainer.batch % self.arm.group_size:
            raise ValueError(
                f"trainer.batch is {self.trainer.batch}; it must be a multiple of arm.group_size = "
                f"{self.arm.group_size}, since groups are trained on whole"
            )
        return self

    @property
    def run_dir(self) -> Path:
        """The folder of the run."""
        return self.run.dir / self.run.name

    @property
    def folder(self) -> RunFolder:
        """The folder of the run, with a name for each of its files."""
        return RunFolder(self.run_dir)

    @property
    def own_folder(self) -> OwnFolder:
        """The folder of the run, to be taken into use or replaced. Raises ConfigError for a name that is none."""
        return OwnFolder(self.run.dir, self.run.name)

    @property
    def arm_name(self) -> str:
        """The arm's name in reports: that of the file without its suffix."""
        return Path(self.run.arm).stem

    def as_report(self) -> dict[str, Any]:
        """All values but the addresses of servers, which change from start to start."""
        addresses = {"queue": {"redis_url"}, "critic": {"url", "address_file"}}
        return self.model_dump(mode="json", exclude=addresses)
