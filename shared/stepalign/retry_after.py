"""The header ``Retry-After``, of a critic or of a server behind one."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

LONGEST_SECONDS = 3600.0
"""A server that asks for more is asked again after this time: no typing error may stop a caller for good."""


def read_retry_after(value: str) -> float | None:
    """Seconds from now, given as seconds or as a date, at most an hour; None when absent or neither."""
    value = value.strip()
    try:
        seconds = float(value) if value[:1].isdecimal() else _until(value)
    except (ValueError, OverflowError):
        return None
    return min(max(seconds, 0.0), LONGEST_SECONDS) if math.isfinite(seconds) else None


def _until(date: str) -> float:
    """Raises ValueError for what is no date."""
    named = parsedate_to_datetime(date)
    if named.tzinfo is None:
        named = named.replace(tzinfo=UTC)
    return (named - datetime.now(UTC)).total_seconds()
