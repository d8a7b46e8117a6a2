"""Notice that weights changed, by whatever route, and name a set of weights by a fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_PIECE = 2**17  # values of a tensor at a time: the numbers they are held against stay in cache


class WeightsWatch:
    """Tell cheaply whether a module still computes what it computed before.

    The key holds, for every parameter and buffer, its storage address, version counter and inner
    products of its values with random numbers; and the state of any adapters. In-place updates by
    an optimizer raise the version, ``load_state_dict`` too; writes through ``.data`` do neither but
    change the products.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._more: list[Tensor] = []
        self._ramps: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self._fingerprint: tuple[Hashable, str] | None = None
        self._held: Hashable = None

    def include(self, tensor: Tensor) -> None:
        """Watch a tensor that is no weight of the module but is trained with it."""
        self._more.append(tensor)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Look at the weights once: the caller changes none meanwhile."""
        before = self._held
        self._held = self.key()
        try:
            yield
        finally:
            self._held = before

    def key(self) -> Hashable:
        """Return a value that is equal as long as the weights and adapters are."""
        if self._held is not None:
            return self._held
        tensors = [*self._module.parameters(), *self._module.buffers(), *self._more]
        with torch.no_grad():
            forms = [self._forms(tensor) for tensor in tensors if tensor.numel()]
            values = torch.cat(forms).cpu().view(torch.int32).tolist() if forms else []
        storage = tuple(
            (t.data_ptr(), -1 if t.is_inference() else t._version, t.dtype, t.shape)
            for t in tensors
        )
        return storage, tuple(values), self._adapters()

    def fingerprint(self) -> str:
        """Return 16 hex digits of a SHA-256 over names, shapes, types and values of the weights."""
        key = self.key()
        if self._fingerprint is None or self._fingerprint[0] != key:
            digest = hashlib.sha256()
            if adapters := self._adapters():
                digest.update(repr(adapters).encode())  # the same weights, used otherwise
            for name, tensor in sorted(self._module.state_dict().items()):
                digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
                values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
                digest.update(values.numpy().data)
            self._fingerprint = (key, digest.hexdigest()[:16])
        return self._fingerprint[1]

    def _forms(self, tensor: Tensor) -> Tensor:
        """Return inner products with fixed random numbers, piece by piece, as float32 [pieces]."""
        values = tensor.detach().reshape(-1)
        if values.dtype not in (torch.float32, torch.float64):
            values = values.float()
        ramp, whole = self._ramp(values), len(values) // _PIECE * _PIECE
        forms = values[:whole].view(-1, _PIECE) @ ramp
        rest = values[whole:]
        return torch.cat([forms, torch.dot(rest, ramp[: len(rest)])[None]]).float()

    def _ramp(self, like: Tensor) -> Tensor:
        key = (like.dtype, like.device)
        if key not in self._ramps:
            generator = torch.Generator().manual_seed(0)
            self._ramps[key] = (torch.rand(_PIECE, generator=generator) + 0.5).to(like)
        return self._ramps[key]

    def _adapters(self) -> Hashable:
        """Return which adapters (peft) act on which modules, and how: this changes no weight."""
        return tuple(
            (
                name,
                str(active),
                bool(getattr(module, "disable_adapters", False)),
                str(getattr(module, "merged_adapters", [])),
                str(getattr(module, "scaling", {})),
            )
            for name, module in self._module.named_modules()
            if (active := getattr(module, "active_adapters", None)) is not None
            and not callable(active)
        )
