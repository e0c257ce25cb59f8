"""Runs whose processes are killed, starved and fed with rubbish, for ``make bench-faults`` and the tests."""
