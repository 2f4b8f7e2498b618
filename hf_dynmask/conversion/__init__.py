"""Converts stock checkpoints to DynMask models with the same outputs, and back. All weights stay bit-equal."""

from .engine import from_transformers, to_transformers

__all__ = ["from_transformers", "to_transformers"]
