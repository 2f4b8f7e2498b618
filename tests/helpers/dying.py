"""Processes that receive a signal at one of their file system calls."""

import os
import signal
import sys
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any

SIGNALS = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]
CONTEXT: Any = get_context("fork") if hasattr(os, "fork") else None


def die(moment: int, how: signal.Signals, act: Callable[..., Any], *args: Any) -> bool:
    """Whether a process that runs `act` died of the signal at its call number `moment`."""
    return _run(moment, how, act, *args)[0] != 0


def calls_of(act: Callable[..., Any], *args: Any) -> int:
    """The number of file system calls that `act` makes."""
    code, calls = _run(0, signal.SIGKILL, act, *args)
    assert code == 0
    return calls


def _run(moment: int, how: signal.Signals, act: Callable[..., Any], *args: Any) -> tuple[int, int]:
    calls = CONTEXT.Value("i", 0)
    process = CONTEXT.Process(target=_dying, args=(calls, moment, how, act, *args))
    process.start()
    process.join()
    return process.exitcode, calls.value


def _dying(calls: Any, moment: int, how: signal.Signals, act: Callable[..., Any], *args: Any) -> None:
    def count(event: str, _) -> None:
        if event == "open" or event.startswith(("os.", "shutil.", "ctypes.", "fcntl.")):
            calls.value += 1
            if calls.value == moment:
                os.kill(os.getpid(), how)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - the traceback of a KeyboardInterrupt
    sys.addaudithook(count)
    act(*args)
