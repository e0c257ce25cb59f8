"""Measurements behind the claims on performance. Each program writes its figures to ``results/``."""
