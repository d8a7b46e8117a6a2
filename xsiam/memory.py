"""Memory budgets: read them, find out what is free, and notice when it is not."""

from __future__ import annotations

import os
import re

import torch

from xsiam.errors import InputError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_PATTERN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")
# Beyond this a larger evaluation is no faster: the matrix products are large enough.
_DEFAULT_LIMIT = 512 * 2**20
# On a CPU products of a thousand rows run at full speed already: twice the size saves at most a
# twentieth of the time.
_CPU_WORKING_SET = 56 * 2**20
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


def parse_bytes(value: str | int) -> int:
    """Return the bytes that "2GB", "512 MiB" or a number of bytes stand for.

    Raises:
        InputError: If ``value`` is not of that form or not positive.
    """
    match = _PATTERN.fullmatch(str(value)) if not isinstance(value, bool) else None
    if match is None or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise InputError(
            f"Expected `memory_budget` to be a positive size such as '2GB' or '512MiB', but got "
            f"{value!r}. Set `attribution.memory_budget`."
        )
    return int(float(match[1]) * _UNITS[match[2].upper()])


def format_bytes(value: float) -> str:
    """Return "512 kB", "3.2 MB" and the like."""
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"


def default_budget(device: torch.device) -> int:
    """Return a quarter of the free memory of ``device``, at most 512 MiB."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    elif hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        free = 4 * _DEFAULT_LIMIT
    return max(1, min(free // 4, _DEFAULT_LIMIT))


def working_set(device: torch.device, budget: int, smallest: int) -> int:
    """Return the bytes that one evaluation should take: within the budget, and fast.

    Args:
        device: Where it runs.
        budget: The most that it may take.
        smallest: What the smallest evaluation takes.
    """
    if device.type != "cpu":
        return budget
    return min(budget, max(_CPU_WORKING_SET, 2 * smallest))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out: the CPU's has no class of its own."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(words in str(error) for words in _OUT_OF_MEMORY)


def release_cached(device: torch.device) -> None:
    """Give memory that PyTorch keeps for later back to an accelerator."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
