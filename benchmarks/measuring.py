"""Seconds and peak memory of one call; needs the standard library alone, torch only where it is.

Scripts that run inside other packages' environments use this module too, so it imports nothing of
xsiam.
"""

from __future__ import annotations

import ctypes
import gc
import time
from pathlib import Path
from typing import Any

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # see proc(5): the peak resident size becomes the current one


def resident(field: str) -> int | None:
    """Return ``VmRSS`` or ``VmHWM`` of this process in bytes, or None where the system has none."""
    if not _STATUS.exists():
        return None
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return None


def reset_peak() -> bool:
    """Let the peak resident size start anew; say whether the system could."""
    try:
        _CLEAR.write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def touch(module: Any) -> None:
    """Read every weight once: weights mapped from a file are not resident before."""
    for tensor in [*module.parameters(), *module.buffers()]:
        tensor.detach().sum().item()


class Meter:
    """Measure one call after :meth:`baseline`, on the processor or on a CUDA device.

    Memory is the peak resident size of the process (CUDA: of allocated memory) above the size at
    the baseline, which is taken once the model is loaded. So libraries' work space that the first
    calls set up counts as well: the figure is an upper bound.

    Args:
        device: "cpu" or "cuda".
    """

    def __init__(self, device: str = "cpu") -> None:
        self.cuda = device.startswith("cuda")
        self.base: int | None = None
        self.started = 0.0
        self.can_reset = True

    def baseline(self) -> None:
        """Note the memory in use now, after handing back what is free."""
        gc.collect()
        if self.cuda:
            import torch

            torch.cuda.synchronize()
            self.base = torch.cuda.memory_allocated()
            return
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:  # glibc
            trim(0)
        self.base = resident("VmRSS")

    def start(self) -> None:
        """Begin to measure."""
        if self.cuda:
            import torch

            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            self.can_reset = reset_peak()
        self.started = time.perf_counter()

    def stop(self) -> tuple[float, int | None]:
        """Return seconds since :meth:`start`, and peak bytes above the baseline (None: unknown)."""
        if self.cuda:
            import torch

            torch.cuda.synchronize()
            seconds = time.perf_counter() - self.started
            peak: int | None = torch.cuda.max_memory_allocated()
        else:
            seconds = time.perf_counter() - self.started
            peak = resident("VmHWM") if self.can_reset else None
        if peak is None or self.base is None:
            return seconds, None
        return seconds, max(0, peak - self.base)
