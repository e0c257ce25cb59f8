"""Whether a run's folder tells of the end of this run: its record, and a report that is newer than its figures."""

from __future__ import annotations

from typing import Any

from stepalign.errors import ConfigError
from stepalign_run.config import Config
from stepalign_run.folder.jsonl import read_object
from stepalign_run.folder.report import Report, UnreadableReportError, read_report


def read_record(config: Config) -> dict[str, Any]:
    """``run.json``, which the trainer writes at its first start; empty before that.

    Raises ConfigError when the folder holds a run of another arm or seed: its figures would go under a wrong name.
    """
    path = config.folder.record
    record = read_object(path)
    if record and (record.get("arm"), record.get("seed")) != (config.arm_name, config.run.seed):
        raise ConfigError(
            f"{path}: the run is of arm {record.get('arm')}, seed {record.get('seed')}; asked for are arm "
            f"{config.arm_name}, seed {config.run.seed}: set run.arm and run.seed (RUN_ARM and RUN_SEED in containers)"
        )
    return record


def last_figure_at(config: Config) -> float:
    """The time of the newest figure in seconds since 1970; 0 before the first."""
    folder = config.folder
    written = [path.stat().st_mtime for path in (folder.metrics, folder.evaluation) if path.exists()]
    return max(written, default=0.0)


def stored_report(config: Config) -> Report | None:
    """The report, if it covers all updates of this run and is newer than every figure; None otherwise.

    Raises ConfigError as :func:`newest_report`.
    """
    report = newest_report(config)
    return report if report is not None and report.steps == config.trainer.steps else None


def newest_report(config: Config) -> Report | None:
    """The report, if it is newer than every figure, of however many updates; None otherwise.

    A report that cannot be read counts as none: the run's end writes it anew. Raises ConfigError as
    :func:`read_record`.
    """
    folder = config.folder
    if not folder.report.exists() or folder.report.stat().st_mtime < last_figure_at(config):
        return None
    read_record(config)
    try:
        return read_report(folder)
    except UnreadableReportError:
        return None
