"""Writing what a finished run leaves."""

from __future__ import annotations

from typing import Any

from stepalign_report.build import PAGE, REPORT, build_report, write_report
from stepalign_report.page import write_page
from stepalign_run.config import Config
from stepalign_run.queue import QueueStatus


def finish_report(config: Config, status: QueueStatus, wall_seconds: float, threads: int) -> dict[str, Any]:
    """Write ``report.json`` of a run that has ended, and the page that shows it."""
    report = build_report(config, status, wall_seconds, threads)
    write_report(config, report)
    ensure_page(config)
    return report


def ensure_page(config: Config) -> None:
    """Write the page of a finished run unless one newer than its report is there, as after a kill between the two."""
    page, report = config.run_dir / PAGE, config.run_dir / REPORT
    if not page.exists() or page.stat().st_mtime < report.stat().st_mtime:
        write_page(page, [config.run_dir])
