"""Batches of embeddings gathered from all processes, with gradients."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, distributed

from xsiam.errors import InputError
from xsiam.losses import EmbeddedBatch


class _Gather(torch.autograd.Function):
    """Stack a tensor of all processes; the backward pass adds up the gradients of all of them.

    PyTorch and Lightning have no function of that kind that is neither private nor deprecated.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        """Return [processes, …]."""
        parts = [torch.empty_like(values) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, values.contiguous())
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """Return the sum over the processes of what each has for this one's values."""
        total = gradients[0].clone(memory_format=torch.contiguous_format)  # others may hold it
        distributed.all_reduce(total)
        return total[distributed.get_rank()]


def is_distributed() -> bool:
    """Return whether there are several processes to gather from."""
    return (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )


def gather(values: Tensor) -> Tensor:
    """Return a tensor of one shape on every process, [processes, …], differentiable."""
    return cast(Tensor, _Gather.apply(values))  # type: ignore[no-untyped-call]


def gather_batch(batch: EmbeddedBatch) -> EmbeddedBatch:
    """Return the rows of all processes, in the order of the processes.

    Processes may have different numbers of rows. The backward pass adds up, for each embedding, the
    gradients of the losses of all processes, and distributed training then averages over processes:
    together that is the gradient of the average loss.

    Args:
        batch: What this process has embedded.

    Raises:
        InputError: If processes have different numbers of columns of negatives.
    """
    columns = torch.stack([batch.a, batch.b, *batch.negatives], dim=1)
    sizes, widths = gather(torch.tensor(columns.shape[:2], device=columns.device)).T.tolist()
    if len(set(widths)) > 1:
        raise InputError(
            "Expected as many columns of negatives on every process, but got "
            f"{[width - 2 for width in widths]}. Set the same `data.train` on all of them."
        )
    a, b, *negatives = _rows(columns, sizes).unbind(dim=1)
    labels, ids, teacher = (
        None if values is None else _rows(values, sizes)
        for values in (batch.labels, batch.text_ids, batch.teacher)
    )
    rank = distributed.get_rank()
    start = sum(sizes[:rank])
    own = slice(start, start + sizes[rank])
    return EmbeddedBatch(a, b, tuple(negatives), labels, ids, own, len(sizes), teacher)


def _rows(values: Tensor, sizes: list[int]) -> Tensor:
    """Return the rows of all processes, padded on the way since collectives take equal shapes."""
    padding = values.new_zeros(max(sizes) - len(values), *values.shape[1:])
    together = gather(torch.cat([values, padding]))
    return torch.cat([rows[:size] for rows, size in zip(together, sizes, strict=True)])
