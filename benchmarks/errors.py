"""The error that ends a benchmark without figures."""

from __future__ import annotations


class BenchError(Exception):
    """The measurement could not be made; a figure from it would mean nothing."""
