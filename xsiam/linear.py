"""Float32 matrix products by the fastest kernel that PyTorch ships, or of rounded factors.

On x86 processors PyTorch multiplies float32 matrices by MKL, which leaves half of the AVX-512 units
of an AMD processor idle; oneDNN, which PyTorch ships too and compiled models use, does not. Both
compute in float32 and differ by rounding only. On an Intel processor MKL is some percent faster,
and takes less memory. ``benchmarks/attribution.py`` measures the one that is taken.

Processors and GPUs with matrix units multiply several times faster where factors are rounded to
bfloat16 or TF32; sums stay float32. Processors with bfloat16 products but no matrix units become
twice as fast; PyTorch rounds for them where tensors are bfloat16 only, so that is done here. So it
is, on both, for a model's own weights: rounding them anew for every product takes as long as the
product of a hundred rows. :mod:`xsiam.integrator` decides where rounding is allowed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_Kernel = Callable[[Tensor, Tensor, Tensor | None, str, list[Any], str], Tensor]


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    transposed: bool = False,
    stays_rounded: bool = False,
) -> Tensor:
    """Return x Wᵀ + b for plain tensors, [..., in] to [..., out]; it has no derivative.

    Args:
        x: Any shape [..., in]; bfloat16 beside a float32 weight where an earlier result stayed so.
        weight: W, [out, in], contiguous: other strides are slow. A parameter of a model may be
            kept rounded.
        bias: b, [out].
        transposed: Whether ``weight`` is Wᵀ.
        stays_rounded: Whether the result may be bfloat16 where factors are rounded: it is rounded
            again as the factor of the next product, and widening it between takes longer.
    """
    kernel = _ONEDNN
    rounded = _rounded_weight(x, weight)
    weight = weight if rounded is None else rounded
    weight = weight.mT if transposed else weight
    if rounded is not None:
        offset = None if bias is None else bias.bfloat16()
        product = nn.functional.linear(x.bfloat16(), weight, offset)
        return product if stays_rounded else product.float()
    if kernel is None or x.dtype != torch.float32 or x.device.type != "cpu":
        return nn.functional.linear(x, weight, bias)
    return kernel(x.contiguous(), weight, bias, "none", [], "")


class FastLinear(TorchFunctionMode):
    """Within this context, linear layers of a model's own forward go through :func:`linear`.

    Only without gradients; ``torch.func`` transforms within it are not meant to be.
    """

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Replace ``torch.nn.functional.linear`` of plain float32 tensors."""
        if function is nn.functional.linear and not kwargs and _is_plain(args):
            return linear(*args)
        return function(*args, **(kwargs or {}))


@contextmanager
def rounded_products() -> Iterator[None]:
    """Within this context factors of float32 products are rounded where that is the faster way.

    A machine without such units computes as ever.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class RoundedWeights:
    """Parameters of a model, rounded to bfloat16 and kept, as long as nobody changes them.

    Args:
        room: The most bytes that they may take.
    """

    def __init__(self, room: int) -> None:
        self.room = room
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        self.nbytes = 0

    def of(self, weight: Tensor) -> Tensor | None:
        """Return a parameter rounded, or None for what is no parameter or does not fit."""
        if not isinstance(weight, nn.Parameter):
            return None
        if id(weight) not in self._kept:
            size = weight.numel() * torch.bfloat16.itemsize
            if self.nbytes + size > self.room:
                return None
            self._kept[id(weight)] = weight, weight.detach().bfloat16()
            self.nbytes += size
        return self._kept[id(weight)][1]


@contextmanager
def rounded_weights_kept(weights: RoundedWeights) -> Iterator[None]:
    """Within this context weights that were rounded are taken from and kept in ``weights``.

    Only processors that round here keep any.
    """
    global _KEPT
    before = _KEPT
    _KEPT = weights
    try:
        yield
    finally:
        _KEPT = before


def room_for_weights() -> int:
    """Return the bytes that rounded weights may take."""
    return _KEPT.room if _KEPT is not None and _HAS_PRODUCTS else 0


def _is_rounding() -> bool:
    return torch.get_float32_matmul_precision() == "medium"


def _rounded_weight(x: Tensor, weight: Tensor) -> Tensor | None:
    """Return the weight rounded, or None where oneDNN rounds, or nothing does."""
    if weight.dtype != torch.float32 or x.device.type != "cpu":
        return None
    stayed = x.dtype == torch.bfloat16
    if not stayed and not (x.dtype == torch.float32 and _HAS_PRODUCTS and _is_rounding()):
        return None
    if _KEPT is not None and (kept := _KEPT.of(weight)) is not None:
        return kept
    is_large = _ROUNDS_HERE and x.numel() >= _ROWS_TO_ROUND * x.shape[-1]
    return weight.bfloat16() if stayed or is_large else None


def _is_plain(args: tuple[Any, ...]) -> bool:
    return not torch.is_grad_enabled() and all(
        arg is None
        or (type(arg) in (Tensor, nn.Parameter) and arg.dtype == torch.float32 and arg.is_cpu)
        for arg in args
    )


def _is_intel() -> bool:
    """Whether PyTorch knows the processor, and that it is Intel's: old versions do not."""
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return "Intel" in str(capabilities.get("cpu_name", ""))


def _onednn() -> _Kernel | None:
    """Return oneDNN's float32 product where it was measured to be the faster one."""
    has_width = torch.backends.cpu.get_cpu_capability() == "AVX512"
    if not _HAS_ONEDNN or not has_width or _is_intel():
        return None
    kernel: _Kernel | None = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return kernel


_HAS_ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
_ONEDNN = _onednn()
_KEPT: RoundedWeights | None = None
_HAS_PRODUCTS: bool = _HAS_ONEDNN and torch.cpu._is_avx512_bf16_supported()
# Whether oneDNN takes bfloat16 products for bfloat16 tensors only.
_ROUNDS_HERE: bool = _HAS_PRODUCTS and not torch.cpu._is_amx_tile_supported()
# Fewer rows do not earn back the rounding of the weights.
_ROWS_TO_ROUND = 128
