"""All that travels with a checkpoint: files beside each other that import by `from .name import X` alone."""
