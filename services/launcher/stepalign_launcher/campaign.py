"""Several runs on equal terms: arms × seeds of one configuration, each a run folder of its own, resumable."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from stepalign.errors import ConfigError
from stepalign_run.config import Config, load_config
from stepalign_run.folder.jsonl import read_object
from stepalign_run.folder.layout import RunFolder
from stepalign_run.folder.stored import stored_report

_FIXED = ("--run.arm", "--run.seed", "--run.name", "--run.dir")


@dataclass(frozen=True)
class Member:
    """One run of the campaign. ``overrides`` are those of its command line."""

    arm: str
    seed: int
    name: str
    overrides: tuple[str, ...]


class Campaign:
    """``directory`` holds a folder per run (``<arm>-<seed>``) and, in the end, the comparison of them all."""

    def __init__(
        self, config_path: Path, arms: Sequence[str], seeds: Sequence[int], directory: Path, overrides: Sequence[str]
    ) -> None:
        """Raises ConfigError for an override that a campaign sets itself, and for settings that cannot be run."""
        taken = sorted(set(_FIXED) & {word.split("=")[0] for word in overrides})
        if taken:
            raise ConfigError(f"{', '.join(taken)}: a comparison sets these itself; choose with --arm and --seed")
        self.config_path = config_path
        self.directory = directory
        self.members = [
            Member(arm, seed, name := f"{Path(arm).stem}-{seed}", self._overrides(arm, seed, name, overrides))
            for seed in seeds
            for arm in arms
        ]
        names = [member.name for member in self.members]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(
                f"{', '.join(twice)}: asked for twice; give each arm and seed once, and arms in files other names"
            )
        for member in self.members:
            self.config(member)

    def _overrides(self, arm: str, seed: int, name: str, overrides: Sequence[str]) -> tuple[str, ...]:
        own = ("--run.arm", arm, "--run.seed", str(seed), "--run.name", name, "--run.dir", str(self.directory))
        return (*own, *overrides)

    def config(self, member: Member) -> Config:
        return load_config(self.config_path, member.overrides)

    def finished(self, member: Member) -> bool:
        """Whether the run's report is there and is of this configuration.

        Raises ConfigError when it is of another one: its figures must not be compared, nor be thrown away unasked.
        """
        config = self.config(member)
        report = stored_report(config)
        if report is None:
            return False
        if report.config != config.as_report():
            raise ConfigError(
                f"{config.run_dir} holds a run with other settings; give another folder, or start anew without --resume"
            )
        return True

    def begun(self, member: Member) -> bool:
        """Whether the run can be resumed."""
        folder = RunFolder(self.config(member).run_dir)
        return folder.record.exists() and folder.metrics.exists()

    def outstanding(self) -> Iterator[Member]:
        return (member for member in self.members if not self.finished(member))

    def ended(self) -> list[Path]:
        """The folders of the runs that have ended."""
        return [self.config(member).run_dir for member in self.members if self.finished(member)]


def started(directory: Path) -> tuple[list[str], list[int]]:
    """Arms and seeds of the runs in a campaign's folder, sorted."""
    records = [read_object(RunFolder(folder).record) for folder in directory.glob("*/")]
    runs = [record for record in records if record]
    return sorted({run["arm"] for run in runs}), sorted({run["seed"] for run in runs})
