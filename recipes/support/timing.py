"""Measures time and memory of methods that do the same work. The methods alternate."""

import ctypes
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import torch

Job = Callable[[], object]  # does some work; its return value is freed after the clock has stopped


def time_in_turns(jobs: Mapping[str, Sequence[Job]], repeats: int, device: torch.device) -> dict[str, float]:
    """Seconds that each method takes for all its jobs: the sum of the medians of its jobs over the repeats.

    The methods alternate job by job, so that a slowdown of the machine affects all of them.
    """
    timed = {method: [(job, []) for job in jobs[method]] for method in jobs}
    for _ in range(1 + repeats):  # the first round warms up
        for turn in zip(*timed.values(), strict=True):
            for job, times in turn:
                times.append(_seconds(job, device))
    return {method: sum(median(times[1:]) for _, times in timed[method]) for method in timed}


def _seconds(job: Job, device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    result = job()
    _synchronize(device)
    stop = time.perf_counter()
    del result
    return stop - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(jobs: Iterable[Job], device: torch.device) -> float | None:
    """Peak memory of jobs in MiB, minus what was in use before. `None` if the system does not report it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before, peak = torch.cuda.memory_allocated(device), partial(torch.cuda.max_memory_allocated, device)
    elif sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # returns freed memory to the system, so that using it again counts
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the current resident memory
        before, peak = _peak_resident(), _peak_resident
    else:
        return None
    for job in jobs:
        job()
    return (peak() - before) / 2**20


def _peak_resident() -> int:
    """Peak resident memory of this process in bytes: `VmHWM` in proc(5), which is in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
