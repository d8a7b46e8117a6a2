"""A sentence encoder cut at any layer: what goes in, what comes out, and a tail to differentiate.

The model's own forward does all the work. A pre-hook on the blocks replaces (or reads) the hidden
states that enter block call ``l``, so masks, relative position biases, final norms, pooling and
Dense modules need no code of ours, and every Hugging Face encoder whose blocks sit in one
``ModuleList`` works without a line written for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from xsiam.errors import InputError, ModelError

Features = dict[str, Any]

# Embedding tables of absolute positions, by the last part of their names in transformers.
_POSITION_TABLES = ("position_embeddings", "position_embedding", "embed_positions", "wpe")


class _Captured(Exception):  # noqa: N818 - ends a forward, is no error
    """Ends a forward once the hidden states that were asked for are known."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class SplitModel:
    """Run a stack of sentence-transformers modules from, or up to, any layer.

    Layer ``l`` for ``0 <= l < L`` means the hidden states that enter the ``l``-th block CALL; ``l =
    L`` is ``last_hidden_state``, from which only pooling and what follows it remain. Calls are
    counted, so that one shared block called L times (ALBERT) has L layers.

    Args:
        modules: The modules in order, the first one a sentence-transformers ``Transformer``.
        probe: Features of one short text, used once to see which blocks the model calls.

    Raises:
        ModelError: If no ``ModuleList`` of the model is called once per layer.
    """

    def __init__(self, modules: Sequence[nn.Module], probe: Features) -> None:
        self.modules = tuple(modules)
        self.transformer = modules[0]
        self.model: Any = modules[0].auto_model
        self.tokenizer: Any = modules[0].tokenizer
        self.calls, self._tensor_outputs = self._find_blocks(probe)
        self.blocks = tuple(dict.fromkeys(self.calls))
        # A block that is called once and returns its hidden states alone can be stepped over.
        self._can_skip = self._tensor_outputs and len(self.blocks) == len(self.calls)

    @property
    def n_layers(self) -> int:
        """L, the number of block calls of one forward."""
        return len(self.calls)

    @property
    def name(self) -> str:
        """The class name of the underlying transformer."""
        return type(self.model).__name__

    def embed(self, features: Features) -> Tensor:
        """Embed a padded batch: [n, S] ids to [n, K] embeddings, without any shift."""
        return self._run_modules(dict(features))

    def capture(self, features: Features, layer: int, *, start: Tensor | None = None) -> Tensor:
        """Return the hidden states [n, S, D] that enter layer ``layer``.

        Args:
            features: A batch of features with [n, S] tensors.
            layer: 0 … L.
            start: Hidden states [n, S, D] to put in at layer 0 instead of the embedded ids.
        """
        self.check_layer(layer)
        if layer == self.n_layers:
            with self._hooked(0, start, None) if start is not None else ExitStack():
                hidden: Tensor = self.transformer(dict(features))["token_embeddings"]
            return hidden
        try:
            with self._hooked(0, start, layer):
                self.transformer(dict(features))
        except _Captured as captured:
            return captured.hidden
        raise ModelError(f"{self.name} ended its forward without a call of block {layer}.")

    def tail(self, features: Features, layer: int, hidden: Tensor) -> Tensor:
        """Embed from layer ``layer`` on: hidden states [n, S, D] to embeddings [n, K]."""
        self.check_layer(layer)
        features = dict(features)
        if layer == self.n_layers:
            features["token_embeddings"] = hidden
            return self._run_modules(features, first=1)
        with self._hooked(layer, hidden, None), self._stepping_over(layer):
            return self._run_modules(features)

    def check_layer(self, layer: int, key: str = "layer") -> None:
        """Raise InputError where ``layer`` is not one of 0 … L."""
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer <= self.n_layers:
            raise InputError(
                f"Expected `layer` to be between 0 and {self.n_layers} for {self.name}, "
                f"but got {layer!r}. Set `{key}`."
            )

    @contextmanager
    def without_positions(self) -> Iterator[None]:
        """Let the absolute position tables of the embedding module return zeros meanwhile."""
        inside = {id(module) for block in self.blocks for module in block.modules()}
        tables = [
            module
            for name, module in self.model.named_modules()
            if name.rpartition(".")[2] in _POSITION_TABLES and id(module) not in inside
        ]
        handles = [table.register_forward_hook(_zero_output) for table in tables]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _run_modules(self, features: Features, first: int = 0) -> Tensor:
        for module in self.modules[first:]:
            features = module(features)
        embedding: Tensor = features["sentence_embedding"]
        return embedding

    def _find_blocks(self, probe: Features) -> tuple[tuple[nn.Module, ...], bool]:
        """Return the blocks in the order of their calls, and whether each returns one tensor."""
        lists = [m for m in self.model.modules() if isinstance(m, nn.ModuleList) and len(m) > 0]
        members = {id(block): number for number, blocks in enumerate(lists) for block in blocks}
        seen: dict[int, list[nn.Module]] = {number: [] for number in range(len(lists))}
        tensors: dict[int, bool] = dict.fromkeys(range(len(lists)), True)

        def record(block: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            number = members[id(block)]
            seen[number].append(block)
            tensors[number] &= isinstance(output, Tensor)

        blocks = {id(block): block for blocks in lists for block in blocks}
        handles = [b.register_forward_hook(record, with_kwargs=True) for b in blocks.values()]
        try:
            with evaluation_mode(self.model), torch.no_grad():
                self.transformer(dict(probe))
        finally:
            for handle in handles:
                handle.remove()
        expected = getattr(getattr(self.model, "config", None), "num_hidden_layers", None)
        for number, calls in seen.items():  # outermost lists come first
            if calls and (expected is None or len(calls) == expected):
                return tuple(calls), tensors[number]
        raise ModelError(
            f"Expected the blocks of {self.name} in one `ModuleList` called {expected} times in a "
            f"forward, but found calls {[len(calls) for calls in seen.values()]}. "
            "Use an encoder with a plain stack of blocks."
        )

    @contextmanager
    def _hooked(self, inject: int, hidden: Tensor | None, capture: int | None) -> Iterator[None]:
        """Replace the input of one block call and end the forward at another."""
        count = 0

        def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            nonlocal count
            call, count = count, count + 1
            if hidden is not None and call == inject:
                args, kwargs = _with_hidden(args, kwargs, hidden)
            if call == capture:
                raise _Captured(_hidden_of(args, kwargs))
            return args, kwargs

        # Blocks below the injection are stepped over only in `tail`, where they still count.
        handles = [b.register_forward_pre_hook(before, with_kwargs=True) for b in self.blocks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _stepping_over(self, layer: int) -> Iterator[None]:
        """Let the blocks below ``layer`` return their input: their output is replaced anyway."""
        skipped = self.blocks[:layer] if self._can_skip else ()
        own = [vars(block).get("forward") for block in skipped]  # offloading tools set one
        for block in skipped:
            block.forward = _identity
        try:
            yield
        finally:
            for block, forward in zip(skipped, own, strict=True):
                if forward is None:
                    del block.forward
                else:
                    block.forward = forward


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Put ``module`` into eval mode and give every submodule its own mode back afterwards."""
    training = [m for m in module.modules() if m.training]
    for submodule in training:
        submodule.training = False
    try:
        yield
    finally:
        for submodule in training:
            submodule.training = True


def features_to(features: Mapping[str, Any], device: torch.device) -> Features:
    """Move the tensors of ``features`` to ``device``."""
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in features.items()}


def select_rows(features: Mapping[str, Any], rows: Tensor) -> Features:
    """Take rows of every [n, …] tensor of ``features``; leave all else as it is."""
    n = features["input_ids"].shape[0]
    return {
        key: value[rows] if isinstance(value, Tensor) and value.ndim and len(value) == n else value
        for key, value in features.items()
    }


def _hidden_key(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | str:
    """Where the hidden states sit among a block's arguments: families differ in this."""
    if args and isinstance(args[0], Tensor):
        return 0
    if isinstance(kwargs.get("hidden_states"), Tensor):
        return "hidden_states"
    for key, value in kwargs.items():
        if isinstance(value, Tensor) and value.ndim == 3:
            return key
    raise ModelError(f"No hidden states among a block's arguments {list(kwargs)}.")


def _hidden_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    key = _hidden_key(args, kwargs)
    hidden: Tensor = args[0] if isinstance(key, int) else kwargs[key]
    return hidden


def _with_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    key = _hidden_key(args, kwargs)
    if isinstance(key, int):
        return (hidden, *args[1:]), kwargs
    return args, {**kwargs, key: hidden}


def _zero_output(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return torch.zeros_like(output)


_identity: Callable[..., Any] = lambda hidden_states, *args, **kwargs: hidden_states  # noqa: E731
