"""``stepalign probe``: Redis, critic, one batch by the solver and the worker that measures it, as processes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from stepalign.errors import ConfigError, ProcessFailedError
from stepalign_launcher.runner import LocalProcesses
from stepalign_launcher.supervisor import Child, Supervisor
from stepalign_run.config import ArmSection, load_config
from stepalign_run.folder.files import replace_text
from stepalign_run.probing import ProbePlan, ProbeReport
from stepalign_run.terms import run_terms
from stepalign_run.training_problems import load_training_problems

SUFFIX = "-probe"


def load_arms(config_path: Path, overrides: Sequence[str], arms: Sequence[str]) -> dict[str, ArmSection]:
    """The arms by their names in reports, each checked as a run of it would check it.

    Raises ConfigError for an arm that there is none of, one that this configuration cannot run, and two of one name.
    """
    found: dict[str, ArmSection] = {}
    for arm in arms:
        config = load_config(config_path, [*overrides, "--run.arm", arm])
        if config.arm_name in found:
            raise ConfigError(f"--arm: two arms are called {config.arm_name!r}; leave one out or rename its file")
        found[config.arm_name] = config.arm
    return found


class LocalProbe(LocalProcesses):
    """A probe on this machine, in a run folder of its own: ``<run.name>-probe``."""

    def __init__(
        self, config_path: Path, overrides: Sequence[str], arms: Sequence[str], rollouts: int, samples: int
    ) -> None:
        """``rollouts`` are of as many problems: there are no more of them than problems in ``data.train``.

        Raises ConfigError as :func:`load_arms`, and for an override that the probe sets itself.
        """
        if any(word.split("=")[0] == "--run.arm" for word in overrides):
            raise ConfigError("--run.arm: a probe looks at several arms; choose them with --arm, which may be repeated")
        config = load_config(config_path, overrides)
        self.plan = ProbePlan(samples=samples, arms=load_arms(config_path, overrides, arms))
        batch = min(rollouts, len(load_training_problems(config)))
        own = {
            "run.name": config.run.name + SUFFIX,
            "run.arm": "null",
            "trainer.steps": 1,
            "trainer.batch": batch,
            "queue.capacity": max(config.queue.capacity, 2 * batch),
        }
        super().__init__(config_path, [*overrides, *(word for k, v in own.items() for word in (f"--{k}", str(v)))])

    @property
    def needs_critic(self) -> bool:
        return any(arm.needs_critic for arm in self.plan.arms.values())

    def stored(self) -> ProbeReport | None:
        """The report of an earlier probe of the same plan, configuration, model and problems."""
        try:
            report = ProbeReport.model_validate_json(self.folder.probe.read_text(encoding="utf-8"))
        except (OSError, ValidationError):
            return None
        terms = run_terms(self.config)
        same = report.plan == self.plan and report.config == self.config.as_report()
        return report if same and all(terms[key] == value for key, value in report.terms.items()) else None

    def run(self) -> None:
        """Probe, replacing an earlier probe of this name. The report is ``probe.json`` in the folder.

        Raises ConfigError when the folder holds a run, NotOursError when it is not ours, ProcessFailedError, and
        KeyboardInterrupt as :meth:`LocalProcesses.work`.
        """
        self.own_folder.require()
        if not self.folder.is_empty and not self.folder.probe_plan.exists():
            raise ConfigError(f"{self.config.run_dir} holds a run; choose another --run.name for the probe")
        self.prepare(resume=False, overwrite=True)
        replace_text(self.folder.probe_plan, self.plan.model_dump_json(indent=1) + "\n")
        status = self.work()
        if self.stored() is None or status.length:
            raise ProcessFailedError(f"the probe left {status.length} rollouts and no report; look at its logs")

    def _start_workers(self, supervisor: Supervisor) -> list[Child]:
        # The solver waits for the next policy, which never comes; it is ended with the supervisor.
        self._command(supervisor, "solver", ends=False)
        return [self._command(supervisor, "probe-worker")]
