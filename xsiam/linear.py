"""Float32 matrix products by the fastest kernel that PyTorch ships, or of rounded factors.

On x86 processors PyTorch multiplies float32 matrices by MKL, which leaves half of the AVX-512 units
of an AMD processor idle; oneDNN, which PyTorch ships too and compiled models use, does not. Both
compute in float32 and differ by rounding only. ``benchmarks/attribution.py`` measures both.

Processors and GPUs with matrix units multiply several times faster where factors are rounded to
bfloat16 or TF32; sums stay float32. Processors with bfloat16 products but no matrix units become
twice as fast; PyTorch rounds for them where tensors are bfloat16 only, so that is done here.
:mod:`xsiam.integrator` decides where rounding is allowed.
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
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, stays_rounded: bool = False
) -> Tensor:
    """Return x Wᵀ + b for plain tensors, [..., in] to [..., out]; it has no derivative.

    Args:
        x: Any shape [..., in]; bfloat16 beside a float32 weight where an earlier result stayed so.
        weight: W, [out, in], contiguous or the transpose of what is: other strides are slow.
        bias: b, [out].
        stays_rounded: Whether the result may be bfloat16 where factors are rounded: it is rounded
            again as the factor of the next product, and widening it between takes longer.
    """
    kernel = _ONEDNN
    stayed = x.dtype == torch.bfloat16 and weight.dtype == torch.float32
    if stayed or _rounds(x):
        rounded = x.bfloat16(), weight.bfloat16(), None if bias is None else bias.bfloat16()
        product = nn.functional.linear(*rounded)
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


def _is_rounding() -> bool:
    return torch.get_float32_matmul_precision() == "medium"


def _rounds(x: Tensor) -> bool:
    """Whether the factors of a product with x are rounded here instead of by oneDNN."""
    return (
        _ROUNDS_HERE
        and _ONEDNN is not None
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.numel() >= _ROWS_TO_ROUND * x.shape[-1]
        and _is_rounding()
    )


def _is_plain(args: tuple[Any, ...]) -> bool:
    return not torch.is_grad_enabled() and all(
        arg is None
        or (type(arg) in (Tensor, nn.Parameter) and arg.dtype == torch.float32 and arg.is_cpu)
        for arg in args
    )


def _onednn() -> _Kernel | None:
    """Return oneDNN's float32 product where it was measured to be the faster one."""
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not available or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return None
    kernel: _Kernel | None = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return kernel


def _rounds_here() -> bool:
    """Whether this processor has bfloat16 products that oneDNN takes for bfloat16 tensors only."""
    has_units: bool = torch.cpu._is_amx_tile_supported()
    has_products: bool = torch.cpu._is_avx512_bf16_supported()
    return has_products and not has_units


_ONEDNN = _onednn()
_ROUNDS_HERE = _rounds_here()
# Fewer rows do not earn back the rounding of the weights.
_ROWS_TO_ROUND = 128
