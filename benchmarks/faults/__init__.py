"""Runs with processes killed, starved and fed with rubbish, for ``make bench-faults`` and the tests."""
