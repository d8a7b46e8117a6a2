"""What is measured: a case is one row of the results, a section a list of cases."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from published import VARIANTS

DEMO_A = "The dog runs after the kitten in the yard."
DEMO_B = "Outside in the garden the cat is chased by the dog."
RETRIVEX_NODES = 250  # its default
QUERY_TOKENS = 10
TIGHT = 1e-5


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        section: One of :data:`SECTIONS`.
        model: Label of the model.
        layer: Where hidden states are taken.
        method: Who computes: "xsiam", "published, loop", "retrivex", …
        title: Tells the case from others of the same method.
        settings: What the method is called with; plain values.
        alone: Whether it gets a process of its own, as figures of time and memory at stake need.
    """

    section: str
    model: str
    layer: int
    method: str
    title: str
    settings: dict[str, Any] = field(default_factory=dict)
    alone: bool = False

    @property
    def key(self) -> str:
        """Name of the row, the same in every run."""
        return f"{self.section} | {self.model} | layer {self.layer} | {self.method} | {self.title}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for a request."""
        return {
            "section": self.section,
            "model": self.model,
            "layer": self.layer,
            "method": self.method,
            "title": self.title,
            "settings": self.settings,
        }


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        layers: For each model label the layers that are held against others, highest first.
        depth: For each model label its number of layers L.
        nodes: N of the published procedure.
        tolerances: Of the adaptive runs.
        repeats: Timed calls of a short case; the median counts.
        lengths: Tokens of both texts in section "length".
        published_lengths: Those at which the published procedure runs as well: its product takes
            (tokens · features)² numbers.
        pair_counts: Pairs of one call in section "pairs".
        batch: Pairs of one call in sections "peak" and "precision".
        budgets: Memory budgets of section "memory".
        long_text: Tokens of its texts.
        documents: Tokens of the documents in section "query".
        all_layers: For each model label the layers of section "layers".
        layer_pairs: Bundled pairs at each of them.
        dtypes: What section "precision" compares with float32.
        variants: Of the published procedure.
        chunk: Cotangents in one batched reverse pass.
        environments: Names of the peers that have an environment.
        peer_defaults: Whether peers also run with their own default number of nodes.
    """

    layers: dict[str, list[int]]
    depth: dict[str, int]
    nodes: int = 50
    tolerances: tuple[float, ...] = (1e-2, 1e-3, 1e-4, TIGHT)
    repeats: int = 5
    lengths: tuple[int, ...] = (8, 16, 32, 64, 128, 256, 512)
    published_lengths: tuple[int, ...] = (8, 16, 32, 64)
    pair_counts: tuple[int, ...] = (1, 10, 100, 1000)
    batch: int = 32
    budgets: tuple[str, ...] = ("2GB", "1GB", "500MB")
    long_text: int = 512
    documents: tuple[int, ...] = (256, 512)
    all_layers: dict[str, list[int]] = field(default_factory=dict)
    layer_pairs: int = 5
    dtypes: tuple[str, ...] = ("bfloat16", "float64")
    variants: tuple[str, ...] = VARIANTS
    chunk: int = 16
    environments: tuple[str, ...] = ()
    peer_defaults: bool = True

    @property
    def published(self) -> list[str]:
        """Methods of the published procedure."""
        return [f"published, {variant}" for variant in self.variants]


def published(plan: Plan) -> list[Case]:
    """The published procedure, xsiam at several tolerances and at its error."""
    cases = []
    for model, layer in _held_layers(plan):
        tight = _adaptive("published", model, layer, TIGHT, plan.repeats)
        own = [_published("published", model, layer, plan, method) for method in plan.published]
        for case in own:
            case.settings["compare_with"] = tight.key
        cases += own
        for tolerance in plan.tolerances:
            case = _adaptive("published", model, layer, tolerance, plan.repeats)
            cases.append(case)
            if tolerance != TIGHT:
                case.settings["compare_with"] = tight.key
        settings = {"tolerance_from": [case.key for case in own], "repeats": plan.repeats}
        settings |= {"fresh_encoder": True, "compare_with": tight.key}
        title = f"at the error of N = {plan.nodes}"
        cases.append(Case("published", model, layer, "xsiam", title, settings, alone=True))
    return cases


def peers(plan: Plan) -> list[Case]:
    """Other packages in their own environments, and xsiam on the score that they explain."""
    cases = []
    for model, layer in _held_layers(plan):
        tight = _adaptive("peers", model, layer, TIGHT, plan.repeats, shift=False)
        found = [
            Case(
                "peers",
                model,
                layer,
                name,
                f"N = {n_nodes}" + (" (its default)" if default else ""),
                {"n_nodes": n_nodes, "default": default}
                # retrivex differentiates through Normalize: entries of another quantity.
                | ({"compare_with": tight.key} if name != "retrivex" else {}),
                alone=True,
            )
            for name, n_nodes, default in (
                *([("retrivex", RETRIVEX_NODES, True)] if plan.peer_defaults else []),
                ("retrivex", plan.nodes, False),
                ("xplainsim", plan.nodes, plan.nodes == 50),
            )
            if name in plan.environments
        ]
        if not found and "xsbert" not in plan.environments:
            continue
        cases += found
        for case in found:
            if case.method == "retrivex":
                settings = {"tolerance_from": [case.key], "repeats": plan.repeats, "shift": False}
                settings |= {"fresh_encoder": True, "compare_with": tight.key}
                title = f"no shift, at the error of retrivex {case.title}"
                cases.append(Case("peers", model, layer, "xsiam", title, settings, alone=True))
        if found:
            cases.append(tight)
        if "xsbert" in plan.environments and layer == plan.layers[model][0]:
            compared = _published("published", model, layer, plan, plan.published[0]).key
            settings = {"n_nodes": plan.nodes, "compare_with": compared}
            cases.append(
                Case("peers", model, layer, "xsbert", f"N = {plan.nodes}", settings, alone=True)
            )
    return cases


def memory(plan: Plan) -> list[Case]:
    """Long texts under memory budgets: MiniLM-like models at three layers, others at one."""
    cases = []
    for number, model in enumerate(plan.layers):
        depth = plan.depth[model]
        layers = (depth, depth - 1, depth - 2) if number == 0 else (depth - 1,)
        budgets = plan.budgets if number == 0 else plan.budgets[:1]
        for layer in layers:
            first: str | None = None
            for budget in budgets:
                settings = {"texts": _words(plan.long_text), "memory_budget": budget}
                settings |= {"tolerance": 1e-2, "repeats": 1, "compare_with": first}
                settings |= {"max_length": plan.long_text, "warm_up": False}
                title = f"{plan.long_text} tokens, budget {budget}"
                case = Case("memory", model, layer, "xsiam", title, settings, alone=True)
                first = first or case.key
                cases.append(case)
    return cases


def peak(plan: Plan) -> list[Case]:
    """The share of the machine's matrix product speed that a batch of pairs reaches."""
    settings = {"texts": {"kind": "bundled", "n": plan.batch}, "count_flops": True}
    return [
        Case(
            "peak",
            model,
            layer,
            "xsiam",
            f"{plan.batch} pairs",
            settings | {"tolerance": 1e-3, "repeats": min(plan.repeats, 3)},
            alone=True,
        )
        for model, depth in plan.depth.items()
        for layer in (depth - 1, depth - 2)
    ]


def length(plan: Plan) -> list[Case]:
    """Both texts grow; the published procedure as far as its product fits."""
    model, layer = _first(plan)
    cases = []
    for tokens in plan.lengths:
        settings = {"texts": _words(tokens), "tolerance": 1e-3, "repeats": min(plan.repeats, 3)}
        settings |= {"max_length": max(plan.lengths)}
        cases.append(Case("length", model, layer, "xsiam", f"{tokens} tokens", settings))
    for tokens in plan.published_lengths:
        settings = {"texts": _words(tokens), "n_nodes": plan.nodes, "chunk": plan.chunk}
        title = f"{tokens} tokens, N = {plan.nodes}"
        cases += [
            Case("length", model, layer, name, title, dict(settings)) for name in plan.published
        ]
    return cases


def pairs(plan: Plan) -> list[Case]:
    """More and more pairs in one call."""
    model, layer = _first(plan)
    return [
        Case(
            "pairs",
            model,
            layer,
            "xsiam",
            f"{n} pairs",
            {"texts": {"kind": "bundled", "n": n}, "tolerance": 1e-3}
            | {"repeats": 1 if n > 100 else min(plan.repeats, 3)},
        )
        for n in plan.pair_counts
    ]


def layers(plan: Plan) -> list[Case]:
    """Every layer, the same pairs."""
    settings = {"texts": {"kind": "bundled", "n": plan.layer_pairs}, "tolerance": 1e-3}
    title = f"{plan.layer_pairs} pairs"
    return [
        Case("layers", model, layer, "xsiam", title, settings | {"repeats": 1})
        for model, chosen in plan.all_layers.items()
        for layer in chosen
    ]


def query(plan: Plan) -> list[Case]:
    """A short query against long documents: mixed mode against forward mode."""
    model, layer = _first(plan)
    cases = []
    for document in plan.documents:
        keys: list[str] = []
        for mode in ("forward", "mixed"):
            settings: dict[str, Any] = {"texts": _words(QUERY_TOKENS, document), "mode": mode}
            settings |= {"quadrature": "gauss_legendre", "n_nodes": 8, "max_length": document}
            settings |= {"repeats": min(plan.repeats, 3), "tolerance": 1e-3}
            settings["compare_with"] = keys[0] if keys else None
            title = f"{QUERY_TOKENS} × {document} tokens, {mode}"
            case = Case("query", model, layer, "xsiam", title, settings, alone=True)
            keys.append(case.key)
            cases.append(case)
    return cases


def precision(plan: Plan) -> list[Case]:
    """Other floating point types against float32, a batch of pairs at once."""
    model, layer = _first(plan)
    base = {"texts": {"kind": "bundled", "n": plan.batch}, "tolerance": 1e-3}
    base |= {"repeats": min(plan.repeats, 3), "keep_matrices": True}
    first = Case("precision", model, layer, "xsiam", "float32", base | {"dtype": "float32"})
    return [first] + [
        Case("precision", model, layer, "xsiam", d, base | {"dtype": d, "compare_with": first.key})
        for d in plan.dtypes
    ]


SECTIONS = {
    section.__name__: section
    for section in (published, peers, memory, peak, length, pairs, layers, query, precision)
}


def _held_layers(plan: Plan) -> list[tuple[str, int]]:
    return [(model, layer) for model, chosen in plan.layers.items() for layer in chosen]


def _first(plan: Plan) -> tuple[str, int]:
    """The first model at its last layer but one: where one text differs from another most."""
    model = next(iter(plan.depth))
    return model, plan.depth[model] - 2


def _words(tokens_a: int, tokens_b: int | None = None) -> dict[str, Any]:
    return {"kind": "words", "tokens_a": tokens_a, "tokens_b": tokens_b or tokens_a}


def _adaptive(
    section: str, model: str, layer: int, tolerance: float, repeats: int, shift: bool = True
) -> Case:
    settings = {"tolerance": tolerance, "repeats": repeats, "shift": shift, "fresh_encoder": True}
    title = f"tolerance {tolerance:.0e}" + ("" if shift else ", no shift")
    return Case(section, model, layer, "xsiam", title, settings, alone=True)


def _published(section: str, model: str, layer: int, plan: Plan, method: str) -> Case:
    settings = {"n_nodes": plan.nodes, "chunk": plan.chunk}
    return Case(section, model, layer, method, f"N = {plan.nodes}", settings, alone=True)
