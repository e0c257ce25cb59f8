"""Chromium, and pages that are opened in it from a file."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from stepalign_report.comparison import compare, read_runs
from stepalign_report.critic_quality.summary import write_summary
from stepalign_report.page import write_page
from support.labelled import quality_summary
from support.page_runs import write_run

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

OpenPage = Callable[..., Page]


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """The machine's Chromium: that of BROWSER_PATH, else the first on the PATH."""
    found = os.environ.get("BROWSER_PATH") or next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        reason = "no Chromium on the PATH; install it (apt-get install chromium) or set BROWSER_PATH"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    # Chromium's sandbox cannot be set up by root, as which containers run.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found, args=arguments)
        yield started
        started.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[OpenPage]:
    """Open a page's file, ``open_page(path, width=400, dark=True)``. Errors and requests of the page fail the test."""
    complaints: list[str] = []
    contexts = []

    def open_(path: Path, width: int = 1280, dark: bool = False) -> Page:
        context = browser.new_context(
            viewport={"width": width, "height": 900},
            color_scheme="dark" if dark else "light",
            reduced_motion="reduce",
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(f"dialog {dialog.message}") or dialog.dismiss())
        page.on("request", lambda request: complaints.append(request.url) if not _is_own(request.url) else None)
        page.goto(path.as_uri())
        page.locator("#curves svg.chart, #curves p, #quality table").first.wait_for()
        return page

    yield open_
    for context in contexts:
        context.close()
    assert complaints == []


def _is_own(url: str) -> bool:
    return url.startswith("data:") or bool(re.fullmatch(r"file://.*/report\.html(#.*)?", url))


@pytest.fixture(scope="session")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of one run."""
    folder = write_run(tmp_path_factory.mktemp("runs") / "demo", name="demo")
    return write_page(folder / "report.html", [folder])


@pytest.fixture(scope="session")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of three arms with two seeds each; only the first arm's runs have tokens."""
    root = tmp_path_factory.mktemp("runs")
    alarms = {"grad_norm": {"first_step": 37, "updates": 4}}
    runs = [
        write_run(root / f"{arm}-{seed}", arm, seed, tokens=arm != "refsol", alarms=alarms if arm == "grpo" else {})
        for arm in ("stepalign_scoped", "refsol", "grpo")
        for seed in (0, 1)
    ]
    return write_page(root / "report.html", runs, compare(read_runs(runs), resamples=500).as_json())


@pytest.fixture(scope="session")
def critics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of two critics against people's labels, without a run."""
    folder = tmp_path_factory.mktemp("critics")
    write_summary(folder / "critic_quality.json", quality_summary())
    return write_page(folder / "report.html", [])


@pytest.fixture(scope="session")
def screenshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where pictures go: the folder that SCREENSHOTS names, else a temporary one."""
    named = os.environ.get("SCREENSHOTS")
    folder = Path(named) if named else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
