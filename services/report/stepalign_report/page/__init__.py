"""``report.html``: one file that shows runs, with their curves, tables, critiques and tokens."""

from stepalign_report.page.page import build_page, require_own_page, write_page

__all__ = ["build_page", "require_own_page", "write_page"]
