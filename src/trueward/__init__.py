"""Reward learning that survives optimisation."""

__version__ = "0.1.0"
