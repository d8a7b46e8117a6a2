"""Weights shared out over processes: which modules are units, and how to get whole weights back.

Every process holds its share of each weight, its gradient and its optimiser state, and gathers the
weights of one unit while that is computed (PyTorch's FSDP2). Numbers are those of `ddp` up to
rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from xsiam.encoder import SiameseEncoder

__all__ = ["ShardedStrategy", "copy_weights", "gathered", "load_weights", "shard", "units", "whole"]


class ShardedStrategy(ModelParallelStrategy):
    """Share weights, gradients and optimiser state out over all processes of a run.

    A checkpoint is one file with whole weights, as those of every other strategy.
    """

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """Join the processes; all of them are data-parallel, on how many machines they may be."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


def units(encoder: SiameseEncoder) -> list[nn.Module]:
    """Return the modules whose weights are gathered together: each block, and the rest.

    The rest, embeddings and what follows the blocks, is the encoder itself, which comes last. A
    block that is called for several layers (ALBERT) is one unit.
    """
    return [*encoder.split.blocks, encoder]


def shard(encoder: SiameseEncoder, mesh: DeviceMesh) -> None:
    """Share the weights of an encoder out over the processes of a mesh; once done it stays so.

    From then on the encoder embeds by being called or by `embed_columns`, on all processes at once.

    Args:
        encoder: An encoder that is equal on all processes.
        mesh: The processes, in one dimension.
    """
    if encoder.sharded:
        return
    for unit in units(encoder):
        fully_shard(unit, mesh=mesh)
    register_fsdp_forward_method(encoder, "embed_columns")
    encoder.sharded = True


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor as it is, or gathered from all processes where they share it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def gathered(encoder: SiameseEncoder) -> Iterator[None]:
    """Let parts of a sharded encoder be called meanwhile, not only the encoder as a whole."""
    if not isinstance(encoder, FSDPModule):
        yield
        return
    encoder.unshard()
    try:
        yield
    finally:
        encoder.reshard()


def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Copy the weights of a sharded module into an equal one that is not, one tensor at a time.

    All processes have to call this together.
    """
    with torch.no_grad():
        for kind in ("named_parameters", "named_buffers"):
            own = dict(getattr(target, kind)())
            for name, tensor in getattr(source, kind)():
                own[name].copy_(whole(tensor.detach()))


def load_weights(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Load whole weights into a module, sharded or not; they are the same on all processes."""
    if any(isinstance(part, FSDPModule) for part in module.modules()):
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(module, dict(state), options=options)
    else:
        module.load_state_dict(state)
