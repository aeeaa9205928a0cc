"""SPEED, step by step: a thin package behind the notebooks."""

__version__ = "0.1.0"
