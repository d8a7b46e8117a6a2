"""Measure attribution: the published procedure, other packages, and xsiam, in one run.

    python benchmarks/attribution.py --output results/attribution --quick
    python benchmarks/attribution.py --output results/attribution --mpnet all-mpnet-base-v2 \
        --make-environments environments --xsbert-source xsbert

Every finished row is written at once to ``results.json`` and ``results.csv``; ``--resume`` goes on
after an interruption. ``results.md`` and ``results.png`` are made from the rows.

Every case runs in a process of its own, all with the same number of threads. Leave the machine to
it: others' work shows in the times.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import shlex
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cases import DEMO_A, DEMO_B, SECTIONS, TIGHT, Case, Plan
from peers import PEERS, local_folder, make_environments, python_of, script_of
from pictures import draw
from processes import Script
from published import VARIANTS
from results import Results, replace_text
from tables import markdown

HERE = Path(__file__).resolve().parent
# Smallest error that is asked of float32: below it only float64 helps.
_FLOOR = 1e-6


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder for all results")
    add("--sections", default=",".join(SECTIONS), help="some of: %(default)s")
    add("--quick", action="store_true", help="few nodes and cases: a few minutes, no figures")
    add("--resume", action="store_true", help="keep finished rows, try failed ones again")
    add("--device", default="cpu", help="cpu or cuda")
    add("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", 0)) or _cores())
    add("--timeout", type=float, default=3600.0, help="seconds for one case")
    add("--nodes", type=int, help="N of the published procedure (50)")
    add("--tolerances", type=float, nargs="*", help="of the adaptive runs (1e-2 to 1e-5)")
    add("--variants", default=",".join(VARIANTS), help="of the published procedure: %(default)s")
    add("--minilm", default="all-MiniLM-L6-v2", help="name or folder of all-MiniLM-L6-v2")
    add("--mpnet", help="name or folder of all-mpnet-base-v2; left out where not given")
    add("--minilm-layers", type=int, nargs="*", help="held against others (5 3 0)")
    add("--mpnet-layers", type=int, nargs="*", help="held against others (10 9)")
    add("--make-environments", type=Path, metavar="FOLDER", help="make peers' environments there")
    add("--environments", type=Path, metavar="FOLDER", help="peers' environments, made before")
    add("--skip-peer-defaults", action="store_true", help="peers with N of --nodes only")
    add("--xsbert-python", type=Path, help="interpreter that can run the reference code")
    add("--xsbert-source", type=Path, help="folder of the reference code (holds xsbert/)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(arguments)
    chosen = options.sections.split(",")
    unknown = sorted(set(chosen) - set(SECTIONS))
    if unknown:
        raise SystemExit(f"Expected --sections among {', '.join(SECTIONS)}, but got {unknown}.")
    unknown = sorted(set(options.variants.split(",")) - set(VARIANTS))
    if unknown:
        raise SystemExit(f"Expected --variants among {', '.join(VARIANTS)}, but got {unknown}.")
    pythons = peer_pythons(options)
    models = {Path(name).name: name for name in (options.minilm, options.mpnet) if name}
    command = shlex.join(["python", "benchmarks/attribution.py", *arguments])
    try:
        results = Results(options.output, resume=options.resume)
        with tempfile.TemporaryDirectory() as links:
            runner = Runner(options, models, pythons, Path(links))
            depth, machine = runner.facts()
            results.begin(command, machine, models)
            plan = make_plan(options, depth, tuple(pythons))
            cases = [case for section in chosen for case in SECTIONS[section](plan)]
            run(cases, results, runner, together=_is_cuda(options))
    except ValueError as error:
        raise SystemExit(str(error)) from error
    report(results)
    return 0


def run(cases: Sequence[Case], results: Results, runner: Runner, *, together: bool = False) -> None:
    """Run the cases that have no row yet and write each row as it comes."""
    missing = [case for case in cases if not results.has(case)]
    print(f"{len(cases) - len(missing)} of {len(cases)} rows are there", flush=True)
    for group in groups(missing, together=together):
        for case, answer in runner.answers(group, results):
            row = results.add(case, answer)
            replace_text(results.folder / "results.md", markdown(results))
            print(f"{case.key}: {_brief(row)}", flush=True)


def groups(cases: Iterable[Case], *, together: bool) -> Iterator[list[Case]]:
    """Put neighbours of one section and model into one process, except those that go alone.

    Args:
        cases: All of them.
        together: Whether none need go alone, as where the device's own allocator knows the memory:
            then one process takes xsiam's, and another one those that wait for others' errors.
    """
    if together:
        kinds: dict[tuple[str, bool], list[Case]] = {}
        for case in cases:
            peer = case.method if case.method in PEERS else ""
            kinds.setdefault((peer, "tolerance_from" in case.settings), []).append(case)
        yield from (kinds[kind] for kind in sorted(kinds, key=lambda kind: kind[1]))
        return
    numbered = enumerate(cases)
    for _, members in itertools.groupby(
        numbered, key=lambda item: item[0] if item[1].alone else (item[1].section, item[1].model)
    ):
        yield [case for _, case in members]


class Runner:
    """Answers cases by the process that each needs.

    Args:
        options: The command line.
        models: Name or folder for each label.
        pythons: The interpreter of each peer that has one.
        links: An empty folder.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        models: dict[str, str],
        pythons: dict[str, Path],
        links: Path,
    ) -> None:
        request = {"models": models, "device": options.device, "threads": options.threads}
        self._own = Script(sys.executable, HERE / "child.py", request, options.timeout)
        request = request | {"models": {k: local_folder(v) for k, v in models.items()}}
        request |= {"texts": [DEMO_A, DEMO_B], "source": str(options.xsbert_source)}
        self._peers = {
            name: script_of(name, python, request, options.timeout, links)
            for name, python in pythons.items()
        }

    def facts(self) -> tuple[dict[str, int], dict[str, Any]]:
        """Return each model's number of layers, and the machine as a measuring process sees it."""
        case = {"section": "", "model": "", "layer": 0, "method": "facts", "title": ""}
        (answer,) = self._own.answers([case | {"settings": {}}])
        if answer["status"] != "ok":
            raise ValueError(f"Expected to load the models, but: {answer['note']}")
        return answer["depth"], answer["machine"]

    def answers(
        self, group: Sequence[Case], results: Results
    ) -> Iterator[tuple[Case, dict[str, Any]]]:
        """Yield cases with their answers; a tolerance that follows others' errors is set here."""
        ready = []
        for case in group:
            sources = case.settings.get("tolerance_from")
            tolerance = own_error(sources, results) if sources else None
            if sources and tolerance is None:
                yield case, {"status": "skipped", "note": "no error to match: see the other rows"}
                continue
            settings = case.settings | ({"tolerance": tolerance} if sources else {})
            ready.append(dataclasses.replace(case, settings=settings))
        if ready:
            script = self._peers.get(ready[0].method, self._own)
            rows = script.answers([case.to_dict() for case in ready])
            yield from zip(ready, rows, strict=True)


def own_error(keys: Sequence[str], results: Results) -> float | None:
    """Return the smallest completeness error of some rows: what xsiam must not exceed."""
    rows = [results.rows[key] for key in keys if key in results.rows]
    errors = [row["completeness_error"] for row in rows if row["status"] == "ok"]
    return max(min(errors), _FLOOR) if errors else None


def report(results: Results) -> None:
    """Write the Markdown and the picture."""
    picture = "results.png" if draw(results, results.folder / "results.png") else None
    replace_text(results.folder / "results.md", markdown(results, picture))
    print(f"written: {results.folder / 'results.md'}")


def make_plan(options: argparse.Namespace, depth: dict[str, int], peers: tuple[str, ...]) -> Plan:
    """Return what to measure.

    Args:
        options: The command line.
        depth: Number of layers L of each model label: the small model first, then the large one.
        peers: Names of the peers that can run.
    """
    held, every = {}, {}
    for number, (label, top) in enumerate(depth.items()):
        small = number == 0
        given = options.minilm_layers if small else options.mpnet_layers
        usual = [top - 1, top // 2, 0] if small else [top - 2, top - 3]
        held[label] = given if given is not None else usual[: 1 if options.quick else None]
        every[label] = list(range(top, -1 if small else top // 2 - 1, -1))
    plan = Plan(
        layers=held,
        depth=depth,
        all_layers=every,
        environments=peers,
        variants=tuple(options.variants.split(",")),
        chunk=1024 if _is_cuda(options) else 16,
        peer_defaults=not options.skip_peer_defaults,
    )
    if options.quick:
        plan = dataclasses.replace(
            plan,
            nodes=5,
            tolerances=(1e-3, TIGHT),
            repeats=2,
            lengths=(8, 32, 128),
            published_lengths=(8,),
            pair_counts=(1, 10),
            batch=8,
            budgets=("1GB",),
            long_text=128,
            documents=(128,),
            all_layers={label: layers[:2] for label, layers in plan.all_layers.items()},
            layer_pairs=2,
            dtypes=("bfloat16",),
            peer_defaults=False,
        )
    if _is_cuda(options):
        plan = dataclasses.replace(plan, batch=8 * plan.batch, layer_pairs=20 * plan.layer_pairs)
    if options.tolerances is not None:
        plan = dataclasses.replace(plan, tolerances=tuple(options.tolerances))
    if options.nodes is not None:
        plan = dataclasses.replace(plan, nodes=options.nodes)
    return plan


def peer_pythons(options: argparse.Namespace) -> dict[str, Path]:
    """Return the interpreters of the peers that can run, after making what was asked for."""
    if options.make_environments is not None:
        names = tuple(n for n in PEERS if n != "xsbert" or options.xsbert_source is not None)
        make_environments(options.make_environments, names)
    folder = options.environments or options.make_environments
    found: dict[str, Path] = {}
    for name in PEERS if folder is not None else ():
        if python_of(folder, name).exists():
            found[name] = python_of(folder, name).absolute()
    if options.xsbert_python is not None:
        found["xsbert"] = options.xsbert_python.absolute()
    if options.xsbert_source is None:
        found.pop("xsbert", None)
    elif not (options.xsbert_source / "xsbert").is_dir():
        raise SystemExit(
            f"Expected a folder that holds xsbert/, but got {options.xsbert_source}. "
            "Set --xsbert-source to a copy of its repository."
        )
    else:
        options.xsbert_source = options.xsbert_source.absolute()
    return found


def _is_cuda(options: argparse.Namespace) -> bool:
    return bool(options.device.startswith("cuda"))


def _brief(row: dict[str, Any]) -> str:
    if row["status"] != "ok":
        return f"{row['status']}: {row['note']}"
    error = row.get("completeness_error")
    return f"{row['seconds']:.3f} s" + ("" if error is None else f", error {error:.1e}")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    sys.exit(main())
