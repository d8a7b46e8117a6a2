"""A sentence encoder cut at any layer: what goes in, what comes out, and a tail to differentiate.

The model's own forward does all the work. While it runs, the blocks' forwards are intercepted: the
hidden states that enter block call ``l`` are replaced (or read), and the calls below are stepped
over. So masks, relative position biases, final norms, pooling and Dense modules need no code of
ours, and every Hugging Face encoder whose blocks sit in one ``ModuleList`` works without a line
written for it. What cannot be cut is refused at construction, by running a short text.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from xsiam.errors import InputError, ModelError
from xsiam.weights import WeightsWatch

Features = dict[str, Any]

# Embedding tables of absolute positions, by the last part of their names in transformers.
_POSITION_TABLES = ("position_embeddings", "position_embedding", "embed_positions", "wpe")
# A tail must follow from hidden states alone. It repeats the forward's own arithmetic (differences
# of 0 were measured); a block that reads something else makes 2e-4 and more.
_CUT_TOLERANCE = 1e-5
_CUT_TOLERANCE_HALF = 2e-2
# Fused kernels beyond PyTorch's own have no forward derivative.
_DIFFERENTIABLE_ATTENTION = (None, "sdpa", "eager")


class _Captured(Exception):  # noqa: N818 - ends a forward, is no error
    """Ends a forward once the hidden states that were asked for are known."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


@dataclass(frozen=True)
class _Call:
    """One call of a block, as the probe saw it.

    Attributes:
        block: The block.
        shape: Of the hidden states that entered.
        bare: Whether it returned one tensor, not a tuple.
        rest: What a tuple held beside hidden states: None, or which argument of the call.
        can_skip: Whether the output has no other parts, so that it follows from the arguments.
    """

    block: nn.Module
    shape: torch.Size
    bare: bool
    rest: tuple[int | str | None, ...] = ()
    can_skip: bool = True

    def skip(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return what the call would return if the block were the identity."""
        hidden = _hidden_of(args, kwargs)
        if self.bare:
            return hidden
        others = (None if key is None else _argument(args, kwargs, key) for key in self.rest)
        return (hidden, *others)


class SplitModel:
    """Run a stack of sentence-transformers modules from, or up to, any layer.

    Layer ``l`` for ``0 <= l < L`` means the hidden states that enter the ``l``-th block CALL; ``l =
    L`` is ``last_hidden_state``, from which only pooling and what follows it remain. Calls are
    counted, so that one shared block called L times (ALBERT) has L layers.

    Args:
        modules: The modules in order, the first one a sentence-transformers ``Transformer``.
        probe: Features of one short text, used once to see which blocks the model calls.

    Raises:
        ModelError: If no ``ModuleList`` of the model is called once per layer, if its blocks do not
            pass on one state per token, or if the probe's numbers are not finite.
    """

    def __init__(self, modules: Sequence[nn.Module], probe: Features) -> None:
        self.modules = tuple(modules)
        self.weights = WeightsWatch(nn.ModuleList(modules))
        self.transformer = modules[0]
        self.model: Any = modules[0].auto_model
        self.tokenizer: Any = modules[0].tokenizer
        if all(isinstance(getattr(self.model, k, None), nn.Module) for k in ("encoder", "decoder")):
            raise ModelError(
                f"Expected an encoder or a decoder, but {self.name} is both: the last hidden "
                "states are the decoder's and belong to other tokens. Use its encoder alone."
            )
        self._probe = probe
        self._cuts: set[int] = set()  # layers that were found to be cuts
        with self._evaluated(), torch.no_grad():
            self._calls = self._find_calls(probe)
        self.calls = tuple(call.block for call in self._calls)
        self.blocks = tuple(dict.fromkeys(self.calls))
        self._check_states(probe)
        self.check_finite(probe)

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
        self._check_range(layer)
        if layer == self.n_layers:
            with ExitStack() if start is None else self._intercepted(0, start):
                hidden: Tensor = self.transformer(dict(features))["token_embeddings"]
            return hidden
        try:
            with self._intercepted(0, start, capture=layer):
                self.transformer(dict(features))
        except _Captured as captured:
            return captured.hidden
        raise ModelError(f"{self.name} ended its forward without a call of block {layer}.")

    def through(
        self, features: Features, layer: int, *, start: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the hidden states [n, S, D] that enter ``layer``, and the embeddings [n, K].

        Args:
            features: A batch of features with [n, S] tensors.
            layer: 0 … L.
            start: As of :meth:`capture`.
        """
        self._check_range(layer)
        seen: list[Tensor] = []
        with self._intercepted(0, start, watch=(layer, seen.append)):
            result = self.transformer(dict(features))
        hidden = result["token_embeddings"] if layer == self.n_layers else seen[0]
        for module in self.modules[1:]:
            result = module(result)
        return hidden, result["sentence_embedding"]

    def tail(self, features: Features, layer: int, hidden: Tensor) -> Tensor:
        """Embed from layer ``layer`` on: hidden states [n, S, D] to embeddings [n, K]."""
        self._check_range(layer)
        self._ensure_cut(layer)
        return self._tail(features, layer, hidden)

    def _tail(self, features: Features, layer: int, hidden: Tensor) -> Tensor:
        features = dict(features)
        if layer == self.n_layers:
            features["token_embeddings"] = hidden
            return self._run_modules(features, first=1)
        with self._intercepted(layer, hidden, step_over=True):
            return self._run_modules(features)

    def check_layer(self, layer: int, key: str = "layer") -> None:
        """Check that the score can be attributed at ``layer``; the first time runs a short text.

        Raises:
            InputError: If ``layer`` is not one of 0 … L.
            ModelError: If blocks above it read more of a text than the hidden states there, or
                attention has no forward derivative.
        """
        self._check_range(layer, key)
        kernel = getattr(self.model.config, "_attn_implementation", None)
        if kernel not in _DIFFERENTIABLE_ATTENTION:
            raise ModelError(
                f"Expected attention 'sdpa' or 'eager', but {self.name} runs {kernel!r}, "
                "which has no forward derivative. Load it with "
                '`model_kwargs={"attn_implementation": "sdpa"}`.'
            )
        self._ensure_cut(layer, key)

    def check_finite(self, features: Features, texts: Sequence[str] | None = None) -> None:
        """Raise ModelError where a number in a forward of a batch is not finite, and say where.

        Args:
            features: A batch of features with [n, S] tensors.
            texts: The n texts, for the message; None decodes the ids.
        """
        states: list[Tensor] = []
        with (
            torch.no_grad(),
            self._evaluated(),
            self._intercepted(0, None, watch=(None, states.append)),
        ):
            result = self.transformer(dict(features))
            states.append(result["token_embeddings"])
            for module in self.modules[1:]:
                result = module(result)
        padding = ~_attended(features)
        finite = [(s.isfinite().all(dim=-1) | padding).all(dim=1) for s in states]
        finite.append(result["sentence_embedding"].isfinite().all(dim=-1))
        for layer, rows in enumerate(finite):
            if not rows.all():
                row = int((~rows).nonzero()[0])
                text = self._decode(features, row) if texts is None else texts[row]
                raise ModelError(
                    f"Expected finite numbers throughout {self.name}, but {self._place(layer)} are "
                    f"not for {text!r}. Check the weights there, or load the model in float32."
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
        with _outputs_through(tables, _zero_output):
            yield

    @contextmanager
    def without_padding_gradients(self) -> Iterator[None]:
        """Let tables that look up nothing but padding return constants meanwhile.

        A table's padding row has no gradient (`torch.nn.Embedding`), which PyTorch finds out by
        making one of the size of the whole table.
        """
        tables = [module for module in self.model.modules() if isinstance(module, nn.Embedding)]
        with _outputs_through(tables, _constant_padding):
            yield

    def _run_modules(self, features: Features, first: int = 0) -> Tensor:
        for module in self.modules[first:]:
            features = module(features)
        embedding: Tensor = features["sentence_embedding"]
        return embedding

    def _check_range(self, layer: int, key: str = "layer") -> None:
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer <= self.n_layers:
            raise InputError(
                f"Expected `layer` to be between 0 and {self.n_layers} for {self.name}, "
                f"but got {layer!r}. Set `{key}`."
            )

    def _place(self, layer: int) -> str:
        """Name the numbers at ``layer``, and what made them; L + 1 is the embedding."""
        if layer > self.n_layers:
            return "the embeddings (from pooling and what follows it)"
        source = "the embedding module" if layer == 0 else f"block {layer - 1}"
        if layer == self.n_layers:
            source += " or a norm after it"
        return f"the hidden states at layer {layer} (from {source})"

    def _decode(self, features: Features, row: int) -> str:
        ids = features["input_ids"][row][_attended(features)[row]]
        return str(self.tokenizer.decode(ids.tolist(), skip_special_tokens=True))

    def _find_calls(self, probe: Features) -> tuple[_Call, ...]:
        """Return the block calls of one forward, in their order."""
        lists = [m for m in self.model.modules() if isinstance(m, nn.ModuleList) and len(m) > 0]
        members = {id(block): number for number, blocks in enumerate(lists) for block in blocks}
        seen: dict[int, list[_Call]] = {number: [] for number in range(len(lists))}

        def record(
            block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            key = _hidden_key(args, kwargs)
            shape = torch.Size() if key is None else _argument(args, kwargs, key).shape
            rest = _rest_of(args, kwargs, output)
            call = _Call(block, shape, isinstance(output, Tensor), rest or (), rest is not None)
            seen[members[id(block)]].append(call)

        blocks = {id(block): block for blocks in lists for block in blocks}
        handles = [b.register_forward_hook(record, with_kwargs=True) for b in blocks.values()]
        try:
            self.transformer(dict(probe))
        finally:
            for handle in handles:
                handle.remove()
        expected = getattr(getattr(self.model, "config", None), "num_hidden_layers", None)
        for calls in seen.values():  # outermost lists come first
            if calls and (expected is None or len(calls) == expected):
                return tuple(calls)
        raise ModelError(
            f"Expected the blocks of {self.name} in one `ModuleList` called {expected} times in a "
            f"forward, but found calls {[len(calls) for calls in seen.values()]}. "
            "Use an encoder with a plain stack of blocks."
        )

    def _check_states(self, probe: Features) -> None:
        """Raise ModelError where a block does not get one state per token."""
        expected = tuple(probe["input_ids"].shape)
        for number, call in enumerate(self._calls):
            if len(call.shape) != 3 or tuple(call.shape[:2]) != expected:
                raise ModelError(
                    f"Expected one hidden state per token at every layer of {self.name}, so "
                    f"{[*expected, 'D']} for the probe, but block {number} gets "
                    f"{list(call.shape)}: it pads, pools or turns its input, and its states belong "
                    "to no tokens. Use an encoder with a plain stack of blocks."
                )

    def _ensure_cut(self, layer: int, key: str = "layer") -> None:
        if layer not in self._cuts and layer < self.n_layers:
            self._check_cut(layer, key)
            self._cuts.add(layer)

    def _check_cut(self, layer: int, key: str) -> None:
        """Raise ModelError where blocks read more of a text than the hidden states at ``layer``.

        The tail runs under the ids of another text: only what hidden states carry can come through.
        """
        probe = features_to(self._probe, next(self.model.parameters()).device)
        ids = probe["input_ids"]
        other = {**probe, "input_ids": torch.full_like(ids, int(ids[0, ids.shape[1] // 2]))}
        with torch.no_grad(), self._evaluated():
            own = self.embed(probe)
            difference = (self._tail(other, layer, self.capture(probe, layer)) - own).norm()
        half = own.dtype in (torch.float16, torch.bfloat16)
        limit = _CUT_TOLERANCE_HALF if half else _CUT_TOLERANCE
        if difference > limit * own.norm():  # not so where either is not finite: reported elsewhere
            raise ModelError(
                f"Expected the embedding to follow from the hidden states at layer {layer}, but "
                f"{self.name} also reads the text itself or lower layers above that layer: under "
                f"the ids of another text it differs by {float(difference / own.norm()):.1e} "
                f"(relative). Set `{key}` to another layer, or use an encoder with a plain stack "
                "of blocks."
            )

    @contextmanager
    def _evaluated(self) -> Iterator[None]:
        with ExitStack() as stack:
            for module in self.modules:
                stack.enter_context(evaluation_mode(module))
            yield

    @contextmanager
    def _intercepted(
        self,
        inject: int,
        hidden: Tensor | None,
        *,
        capture: int | None = None,
        step_over: bool = False,
        watch: tuple[int | None, Callable[[Tensor], None]] | None = None,
    ) -> Iterator[None]:
        """Run forwards with the block calls in our hands.

        Args:
            inject: The call whose input is replaced.
            hidden: What it gets, or None to leave it.
            capture: The call whose input ends the forward, as :class:`_Captured`.
            step_over: Whether calls below ``inject`` return their input where they can: their
                output is replaced anyway.
            watch: A call, or None for every call, and what gets the hidden states that enter it.
        """
        count = 0

        def call(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            nonlocal count
            number, count = count, count + 1
            if step_over and number < inject and self._calls[number].can_skip:
                return self._calls[number].skip(args, kwargs)
            if hidden is not None and number == inject:
                args, kwargs = _with_hidden(args, kwargs, hidden)
            if watch is not None and watch[0] in (number, None):
                watch[1](_hidden_of(args, kwargs))
            if number == capture:
                raise _Captured(_hidden_of(args, kwargs))
            return forward(*args, **kwargs)

        with self._forwards(
            {block: functools.partial(call, block.forward) for block in self.blocks}
        ):
            yield

    @contextmanager
    def recomputing(self) -> Iterator[None]:
        """Let blocks keep only their inputs for the backward pass, and compute the rest anew there.

        Dropout is the same both times, and so are the gradients; the price is a second forward pass
        of the blocks. This holds for forwards meanwhile, whenever their backward pass comes.
        """
        with self._forwards(
            {block: functools.partial(_recomputed, block, block.forward) for block in self.blocks}
        ):
            yield

    @contextmanager
    def _forwards(self, forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
        """Replace the forwards of blocks meanwhile."""
        own = {block: vars(block).get("forward") for block in forwards}  # offloading tools set one
        for block, forward in forwards.items():
            block.forward = forward
        try:
            yield
        finally:
            for block, before in own.items():
                if before is None:
                    del block.forward
                else:
                    block.forward = before


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


def _recomputed(block: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call the forward of a block without keeping more than its inputs.

    The backward pass comes when the block may be in another mode, so that it is kept as well.
    """
    evaluates = not block.training

    def run(*args: Any, **kwargs: Any) -> Any:
        with evaluation_mode(block) if evaluates else nullcontext():
            return forward(*args, **kwargs)

    return checkpoint(run, *args, use_reentrant=False, **kwargs)


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


def join_features(columns: Sequence[Features]) -> Features | None:
    """Return the texts of several batches as one, padded on the right; None where kinds differ.

    Batches are of one kind if they hold the same tensors and are equal in all else, as in the
    length of a prompt.
    """
    shapes = [column["input_ids"].shape for column in columns]
    joined: Features = {}
    for key, first in columns[0].items():
        values: list[Any] = [column.get(key) for column in columns]
        if not isinstance(first, Tensor):
            if any(value != first for value in values):
                return None
            joined[key] = first
        elif all(
            isinstance(v, Tensor) and v.shape[:2] == s for v, s in zip(values, shapes, strict=True)
        ):
            joined[key] = torch.cat([_padded(value, max(s[1] for s in shapes)) for value in values])
        else:
            return None
    return joined if all(column.keys() == joined.keys() for column in columns) else None


def trim(features: Features) -> Features:
    """Return features without the positions on the right that no text of the batch has."""
    shape = features["input_ids"].shape
    used = features["attention_mask"].any(dim=0).nonzero()
    width = int(used.max()) + 1
    return {
        key: value[:, :width] if isinstance(value, Tensor) and value.shape[:2] == shape else value
        for key, value in features.items()
    }


def _padded(values: Tensor, length: int) -> Tensor:
    """Add positions that nothing attends to: zeros up to ``length`` in the second dimension."""
    padding = values.new_zeros(len(values), length - values.shape[1], *values.shape[2:])
    return torch.cat([values, padding], dim=1)


def _attended(features: Mapping[str, Any]) -> Tensor:
    """Return which positions of a batch hold a token, [n, S]; flattened batches have no padding."""
    mask = features.get("attention_mask")
    ids: Tensor = features["input_ids"]
    return torch.ones_like(ids).bool() if mask is None else mask.bool()


def _hidden_key(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | str | None:
    """Where the hidden states sit among a block's arguments: families differ in this."""
    if args and isinstance(args[0], Tensor):
        return 0
    if isinstance(kwargs.get("hidden_states"), Tensor):
        return "hidden_states"
    for key, value in kwargs.items():
        if isinstance(value, Tensor) and value.ndim == 3:
            return key
    return None


def _argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], key: int | str) -> Any:
    return args[key] if isinstance(key, int) else kwargs[key]


def _hidden_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    key = _hidden_key(args, kwargs)
    if key is None:
        raise ModelError(f"No hidden states among a block's arguments {list(kwargs)}.")
    hidden: Tensor = _argument(args, kwargs, key)
    return hidden


def _with_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    key = _hidden_key(args, kwargs)
    if isinstance(key, str):
        return args, {**kwargs, key: hidden}
    return (hidden, *args[1:]), kwargs


def _rest_of(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
) -> tuple[int | str | None, ...] | None:
    """Return which arguments a block returned beside hidden states, or None for work of its own.

    T5's first block returns the position bias it computed, those above it what they were given.
    """
    if isinstance(output, Tensor):
        return ()
    if not isinstance(output, tuple) or not output or not isinstance(output[0], Tensor):
        return None
    given: dict[int, int | str] = {id(value): key for key, value in enumerate(args)}
    given |= {id(value): key for key, value in kwargs.items()}
    if any(value is not None and id(value) not in given for value in output[1:]):
        return None
    return tuple(None if value is None else given[id(value)] for value in output[1:])


@contextmanager
def _outputs_through(modules: Sequence[nn.Module], hook: Callable[..., Tensor]) -> Iterator[None]:
    """Let a hook replace what some modules return meanwhile."""
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _zero_output(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return torch.zeros_like(output)


def _constant_padding(table: nn.Embedding, args: Any, output: Tensor) -> Tensor:
    padding = table.padding_idx
    is_constant = padding is not None and bool((args[0] == padding).all())
    return output.detach() if is_constant else output
