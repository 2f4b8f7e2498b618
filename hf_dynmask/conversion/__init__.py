"""Stock checkpoints in, DynMask models with the same outputs out, and back, every weight bit-equal."""

from .engine import from_transformers, to_transformers

__all__ = ["from_transformers", "to_transformers"]
