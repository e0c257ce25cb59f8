"""Graders of answers that need more than text and numbers; each is found by its name in ``stepalign.graders``."""
