"""``report.html``: one or several finished runs as a page that is one file and needs no network.

The page holds its data as JSON and draws it with its own script; styles and script stand in ``assets``. A model wrote
the texts of rollouts, so none of them is ever markup: in the file ``<`` is escaped inside the JSON, the script makes
text nodes of it, and a content security policy admits no script but the page's own.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from stepalign.commands.printable import printable
from stepalign_report.critic_quality.summary import read_summary
from stepalign_report.page.data import page_data
from stepalign_run.folder.files import replace_text
from stepalign_run.folder.layout import RunFolder
from stepalign_run.folder.outputs import require_own_file

TEMPLATE = "report.html"
STYLES = ("base.css", "figures.css", "controls.css", "tokens.css", "media.css")
# One module in the page, in this order: each part uses the parts before it.
SCRIPTS = (
    "dom.js",
    "charts.js",
    "figures.js",
    "curves.js",
    "counts.js",
    "quality.js",
    "token_spans.js",
    "tokens.js",
    "report.js",
)
_SIGN = '<meta name="generator" content="stepalign">'
_PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}")


def build_page(
    runs: Sequence[Path], comparison: dict[str, Any] | None = None, quality: dict[str, Any] | None = None
) -> str:
    """The page of finished run folders; with several of them every arm and seed stands in its curves and tables.

    ``comparison`` is the output of ``stepalign compare --json``, ``quality`` that of ``stepalign critic-quality
    --json``, which has a section, or without runs the page. Raises ConfigError when a folder holds no report, or when
    the runs cannot stand on one page.
    """
    data = page_data(runs, comparison, quality)
    style, script = _assets(STYLES), _assets(SCRIPTS)
    values = {
        "title": html.escape(printable(data["title"])),
        "policy": f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}",
        "style": style,
        "data": _as_json(data),
        "script": script,
    }
    return _PLACEHOLDER.sub(lambda found: values[found[1]], _asset(TEMPLATE))


def write_page(target: Path, runs: Sequence[Path], comparison: dict[str, Any] | None = None) -> Path:
    """Write the page to a file, whole or not at all. It shows the ``critic_quality.json`` that lies beside it, if any.

    Raises ConfigError as :func:`build_page` does, and NotOursError when another page is there.
    """
    page = build_page(runs, comparison, read_summary(RunFolder(target.parent).critic_quality))
    require_own_page(target)
    replace_text(target, page)
    return target


def require_own_page(path: Path) -> None:
    """Raises NotOursError when a file is there that is no page of ours."""
    require_own_file(path, lambda text: _SIGN in text, "move it away, or give another folder")


def _asset(name: str) -> str:
    return (files("stepalign_report.page") / "assets" / name).read_text(encoding="utf-8")


def _assets(names: Sequence[str]) -> str:
    return "\n".join(_asset(name) for name in names)


def _hash(text: str) -> str:
    """The source expression that admits exactly this inline text."""
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def _as_json(data: dict[str, Any]) -> str:
    """JSON that may stand inside a script element: without ``<`` it can neither end it nor open a comment in it."""
    return json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
