"""Counts the operators that run, and gives values where none are."""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Operators(TorchDispatchMode):
    """Counts operators, and gives one number for every value that is read."""

    def __init__(self, value=None):
        super().__init__()
        self.value, self.calls = value, Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[str(function)] += 1
        if self.value is not None and function is torch.ops.aten._local_scalar_dense.default:
            return self.value
        return function(*args, **kwargs or {})

    @property
    def reads(self):
        return self.calls["aten._local_scalar_dense.default"]
