"""The code that is exported with a checkpoint. Its files import each other only by `from .name import X`."""
