"""Write the report of a finished run and its page, and the comparison of several runs and its page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stepalign.errors import ConfigError
from stepalign_report.build import build_report
from stepalign_report.comparison import Comparison, compare, require_own_comparison, write_comparison
from stepalign_report.page import require_own_page, write_page
from stepalign_report.runs import read_runs
from stepalign_run.config import Config
from stepalign_run.folder.layout import RunFolder
from stepalign_run.folder.report import Report, write_report
from stepalign_run.queue import QueueStatus


def finish_report(config: Config, status: QueueStatus, wall_seconds: float, threads: int) -> Report:
    """Write ``report.json`` of a run that has ended, and the page that shows it.

    Raises NotOursError when the folder is somebody else's.
    """
    config.own_folder.claim()
    report = build_report(config, status, wall_seconds, threads)
    folder = config.folder
    write_report(folder, report)
    ensure_page(folder)
    return report


def ensure_page(folder: RunFolder) -> None:
    """Write the page of a finished run unless one newer than its files is there, as after a kill between the two."""
    page = folder.page
    shown = [file.stat().st_mtime for file in (folder.report, folder.critic_quality) if file.exists()]
    if not page.exists() or page.stat().st_mtime < max(shown):
        write_page(page, [folder.path])


def compare_into(target: RunFolder, folders: Sequence[Path]) -> Comparison:
    """Compare finished runs and write ``comparison.json`` and ``report.html`` of them all to ``target``.

    Raises ConfigError as :func:`~stepalign_report.runs.read_run` and :func:`~stepalign_report.comparison.compare`, and
    for a ``target`` that is a run's folder; NotOursError when it holds files of these names that are not ours.
    """
    if target.report.exists() or target.record.exists():
        raise ConfigError(f"{target.path} holds a run, whose page it would replace; give a folder of its own")
    require_own_comparison(target.comparison)
    require_own_page(target.page)
    runs = read_runs(folders)
    comparison = compare(runs)
    for run in runs:
        ensure_page(RunFolder(run.folder))
    target.path.mkdir(parents=True, exist_ok=True)
    write_comparison(target.comparison, comparison)
    of_name = {run.name: run.folder for run in runs}
    write_page(target.page, [of_name[name] for name, _, _ in comparison.runs], comparison.as_json())
    return comparison
