"""What this machine can do, and how much arithmetic a call performs."""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from xsiam.linear import linear

_PEAK_SIZES = {"cpu": (1024, 2048, 4096), "cuda": (4096, 8192)}
_PEAK_TRIALS = 4
# What one run must share with the run it resumes: figures of two machines do not mix.
SAME = ("processor", "threads", "torch", "device")
_KINDS = {
    "products": ("mm", "bmm", "addmm", "baddbmm", "mv", "dot", "linear", "_linear_pointwise"),
    "copies": ("copy", "cat", "clone", "index_add", "index_put", "stack", "_to_copy", "index"),
}


def facts(device: str, *, peak: bool = True) -> dict[str, Any]:
    """Describe the machine; the matmul peak is measured where it is asked for."""
    described = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
    }
    return described | ({"peak_flops": matmul_peak(device)} if peak else {})


def matmul_peak(device: str = "cpu") -> float:
    """Return the float32 operations a second of the fastest of some square matrix products.

    ``torch.mm`` and the kernel that xsiam uses are both tried.
    """
    kind = "cuda" if device.startswith("cuda") else "cpu"
    return max(_speed(size, device, f) for size in _PEAK_SIZES[kind] for f in (torch.mm, linear))


def _speed(size: int, device: str, product: Callable[[Tensor, Tensor], Tensor]) -> float:
    left = torch.randn(size, size, device=device)
    right = torch.randn(size, size, device=device)
    best = float("inf")
    for _ in range(_PEAK_TRIALS):
        synchronize(device)
        start = time.perf_counter()
        product(left, right)
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def synchronize(device: str) -> None:
    """Wait until a CUDA device is done; others are when a call returns."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def count_flops(call: Callable[[], Any]) -> int:
    """Return the operations of all matrix products and attention kernels that ``call`` executes.

    A multiplication and an addition are two; element-wise work counts nothing. The count is taken
    where the backend is called, after transforms such as ``vmap`` and ``jvp``, so it knows nothing
    of the caller and includes products that are wasted.
    """
    with FlopCounterMode(display=False, custom_mapping=_PROCESSOR_KERNELS) as counter:
        call()
    return int(counter.get_total_flops())


def time_by_kind(call: Callable[[], Any], device: str = "cpu") -> dict[str, float]:
    """Return the shares of the operators' own time that ``call`` spends on each kind of them.

    Kinds are matrix products, copies (layouts, concatenations, conversions) and all else, which is
    mostly element-wise work. Time between operators, Python's, is the rest of a call and in none.
    On a CUDA device it is the device's time that counts.
    """
    cuda = device.startswith("cuda")
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if cuda else []
    with torch.profiler.profile(activities=activities) as profiler:
        start = time.perf_counter()
        call()
        synchronize(device)
        seconds = time.perf_counter() - start
    totals = dict.fromkeys((*_KINDS, "elementwise"), 0.0)
    for event in profiler.key_averages():
        if cuda and event.device_type != torch.autograd.DeviceType.CPU:
            continue  # kernels: the operators that launched them have their time already
        name = event.key.rpartition("::")[2].rstrip("_")
        kind = next((kind for kind, names in _KINDS.items() if name in names), "elementwise")
        own = event.self_device_time_total if cuda else event.self_cpu_time_total
        totals[kind] += own / 1e6 / seconds
    return totals


def _attention_flops(
    query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    """Operations of q kᵀ and of the weights' product with v, from [n, heads, S, d] shapes."""
    n, heads, length, size = query
    return int(2 * n * heads * length * key[2] * (size + value[3]))


def _baddbmm_flops(added: Any, left: Any, right: Any, *args: Any, **kwargs: Any) -> int:
    """Operations of a batched product that is added in place, from [n, m, k] and [n, k, p]."""
    return 2 * math.prod(left) * int(right[2])


def _linear_flops(x: Any, weight: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Operations of x Wᵀ, from shapes [..., in] and [out, in]."""
    return 2 * math.prod(x) * int(weight[0])


# The formulas that FlopCounterMode lacks: fused attention, products that are added in place, and
# oneDNN's product on the processor.
_PROCESSOR_KERNELS: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten.baddbmm_: _baddbmm_flops,
}
if torch.backends.mkldnn.is_available():
    _PROCESSOR_KERNELS[torch.ops.mkldnn._linear_pointwise] = _linear_flops


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
