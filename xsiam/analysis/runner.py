"""Run analyses: check what each needs, integrate once for all, keep what is finished."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

from xsiam.analysis.base import (
    AbstractAnalysis,
    NotApplicableError,
    VectorRequest,
    get_analysis,
    names_in_order,
)
from xsiam.analysis.context import Context
from xsiam.analysis.storage import (
    Outcome,
    check_result,
    read_outcome,
    settings_hash,
    write_outcome,
)
from xsiam.processes import Processes

__all__ = ["ALL", "Plan", "chosen_names"]

ALL = "all"
"""Name that stands for every analysis."""


def chosen_names(names: Sequence[str]) -> list[str]:
    """Return the names of analyses in the order in which they run.

    Raises:
        InputError: If one is unknown.
    """
    if list(names) == [ALL]:
        return names_in_order()
    for name in names:
        get_analysis(name)
    return [name for name in names_in_order() if name in names]


@dataclass
class Plan:
    """Analyses that are to be made.

    Making one checks what every analysis needs, before any long work begins: what is not given or
    not installed is a reason to skip an analysis, what is given and cannot be used an error.

    Args:
        names: Analyses, or "all".
        context: Pairs and models.
        folder: Where results go, a folder for each analysis.
        tell: Called with a line for every step.

    Raises:
        InputError: If a name is unknown.
        ModelError: If a model that is given cannot be loaded.
    """

    names: Sequence[str]
    context: Context
    folder: Path
    tell: Callable[[str], None] = print
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    _digests: dict[str, str] = field(default_factory=dict)
    _requests: list[VectorRequest] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.names = chosen_names(self.names)
        for name in self.names:
            analysis = get_analysis(name)
            try:
                _check_needs(analysis, self.context)
                digest = settings_hash(analysis, self.context)
                found = read_outcome(self.folder / name)
                if found and found[1] == digest and found[0].status == "finished":
                    self.outcomes[name] = replace(found[0], reused=True)
                    continue
                self._requests += analysis.requests(self.context)
                self._digests[name] = digest
            except NotApplicableError as error:
                self.outcomes[name] = Outcome(name, "skipped", str(error))

    def run(self, group: Processes) -> list[Outcome]:
        """Make the analyses; of several processes each makes its share, and all get all outcomes.

        An analysis that fails is reported as failed and does not keep others from finishing.
        """
        if self._requests and group.first:
            self.tell("Integrating the token vectors that the analyses need …")
        self.context.prepare(self._requests, group.rank, group.world_size)
        group.wait()
        self.context.open(self._requests)
        if group.first:
            for name, outcome in self.outcomes.items():
                if outcome.status == "skipped":
                    write_outcome(self.folder / name, get_analysis(name), outcome, None)
        for number, name in enumerate(self._digests):
            if number % group.world_size == group.rank:
                self._make(get_analysis(name))
        group.wait()
        for name in self._digests:
            found = read_outcome(self.folder / name)
            assert found is not None, name
            self.outcomes[name] = found[0]
        return [self.outcomes[name] for name in self.names]

    def _make(self, analysis: AbstractAnalysis) -> None:
        self.tell(f"{analysis.name}: {analysis.question}")
        start = time.monotonic()
        folder, digest = self.folder / analysis.name, self._digests[analysis.name]
        try:
            result = analysis.run(self.context)
            check_result(result)
            outcome = Outcome(
                analysis.name, "finished", result=result, seconds=time.monotonic() - start
            )
            write_outcome(folder, analysis, outcome, digest)
        except NotApplicableError as error:
            write_outcome(folder, analysis, Outcome(analysis.name, "skipped", str(error)), digest)
        except Exception as error:  # whatever it is, the other analyses are not to be lost
            reason = f"{type(error).__name__}: {error}"
            write_outcome(folder, analysis, Outcome(analysis.name, "failed", reason), digest)
            (folder / "traceback.txt").write_text(traceback.format_exc(), encoding="utf-8")


def _check_needs(analysis: AbstractAnalysis, context: Context) -> None:
    """Raise NotApplicableError, with the reason, where something is not there."""
    needs = analysis.needs
    for module, command in needs.packages.items():
        if find_spec(module) is None:
            raise NotApplicableError(f"it needs the package `{module}`: {command}")
    if needs.parser:
        _ = context.parser
    if needs.labels and context.pairs.labels is None:
        raise NotApplicableError("it needs labels, and the pairs have none")
    if len(context.pairs) < needs.min_pairs:
        raise NotApplicableError(
            f"it needs {needs.min_pairs} pairs or more, but there are n = {len(context.pairs)}"
        )
    for name in analysis.models(context):
        encoder = context.model(name)
        for layer in context.layers:
            encoder.check_layer(layer, key="analysis.layers")
    if needs.shift and not context.encoder.shift:
        raise NotApplicableError("it needs a `checkpoint` with a reference shift")
