"""The `xsiam` command: train, evaluate, explain, rank, index, upload.

Only the standard library is imported here, so that ``xsiam --help`` answers at once; each command
imports what it needs.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xsiam import __version__

if TYPE_CHECKING:
    from xsiam.attribution import PairAttributor
    from xsiam.index import TokenVectorIndex

_USER_ERROR = 2
_INTERRUPTED = 130
_DEFAULT_MODEL = "all-MiniLM-L6-v2"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    It is 0, 1 where an analysis has failed, 2 for a user error, 130 after Ctrl-C.

    Args:
        argv: Arguments without the program's name; None takes those of the process.
    """
    arguments = _parser().parse_args(sys.argv[1:] if argv is None else list(argv))
    try:
        with _own_warnings():
            code: int | None = arguments.run(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _INTERRUPTED
    except (ValueError, FileNotFoundError) as error:
        if arguments.debug or not _is_users(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return _USER_ERROR
    return code or 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="xsiam",
        description="Train, evaluate and explain Siamese text encoders, exactly.",
    )
    parser.add_argument("--version", action="version", version=f"xsiam {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_train(commands)
    _add_evaluate(commands)
    _add_explain(commands)
    _add_rank(commands)
    _add_fit_reference(commands)
    _add_upload(commands)
    index_commands = _add_index(commands)
    for command in [*commands.choices.values(), *index_commands.choices.values()]:
        if command.get_default("run") is not None:
            command.add_argument(
                "--debug", action="store_true", help="show tracebacks of user errors"
            )
    return parser


def _add_train(commands: Any) -> None:
    train = commands.add_parser(
        "train",
        help="train an encoder from YAML files and key=value overrides",
        description="Train an encoder: xsiam train configs/quickstart.yaml trainer.max_epochs=1",
    )
    train.add_argument("settings", nargs="*", metavar="CONFIG.yaml | key=value")
    train.set_defaults(run=_train)


def _add_evaluate(commands: Any) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="score pairs and report how accurate their attributions are",
        description="Evaluate a model: xsiam evaluate checkpoint=best.ckpt data.test=test.csv",
    )
    evaluate.add_argument("settings", nargs="*", metavar="CONFIG.yaml | key=value")
    evaluate.set_defaults(run=_evaluate)


def _add_explain(commands: Any) -> None:
    explain = commands.add_parser(
        "explain",
        help="split the score of two texts over their tokens",
        description="Print the attribution matrix of two texts, with main effects and errors.",
    )
    explain.add_argument("text_a", metavar="TEXT_A")
    explain.add_argument("text_b", metavar="TEXT_B")
    _add_attributor(explain)
    explain.add_argument("--role-a", help="query, document or the name of a prompt")
    explain.add_argument("--role-b")
    explain.add_argument("--plot", type=Path, metavar="FILE.png", help="write a heat map")
    explain.add_argument("--save", type=Path, metavar="FILE.safetensors", help="write the result")
    explain.add_argument("--top", type=int, default=5, help="strongest pairs to list (default: 5)")
    explain.set_defaults(run=_explain)


def _add_rank(commands: Any) -> None:
    rank = commands.add_parser(
        "rank",
        help="rank documents for a query, and split what lifts one above another over tokens",
        description="Print a ranking, and which tokens of the query decide each comparison.",
    )
    rank.add_argument("--query", required=True)
    source = rank.add_mutually_exclusive_group(required=True)
    source.add_argument("--documents", type=Path, metavar="FILE", help="one a line, UTF-8")
    source.add_argument(
        "--index",
        type=Path,
        metavar="FOLDER",
        help="documents of an index, whose layer, reference, shift and similarity are taken",
    )
    _add_attributor(rank)
    rank.add_argument("--relevant", help="ids, from 0, of documents that should be first: 3 or 3,5")
    rank.add_argument(
        "--against",
        help="what documents are compared with: below, above, relevant or an id "
        "(default: relevant where one is named, else below)",
    )
    rank.add_argument("--top", type=int, default=10, help="documents to explain (default: 10)")
    rank.add_argument("--role-query", default="auto", help="query, document or a prompt's name")
    rank.add_argument("--role-documents", default="auto")
    rank.add_argument("--html", type=Path, metavar="FILE.html", help="write a page")
    rank.set_defaults(run=_rank)


def _add_attributor(command: argparse.ArgumentParser) -> None:
    """Add what a model and its attributor are made from."""
    command.add_argument("--model", default=_DEFAULT_MODEL, help="name, folder or checkpoint")
    command.add_argument("--layer", type=int, help="0 … L (default: L-2)")
    command.add_argument("--tolerance", type=float, default=1e-3)
    command.add_argument("--max-nodes", type=int, default=4096)
    command.add_argument(
        "--reference",
        help="pad, uniform, fitted, neutral, mask or unk (default: the model's own, else fitted)",
    )
    command.add_argument(
        "--shift",
        action=argparse.BooleanOptionalAction,
        help="subtract the reference embedding (default: as the model was trained, else no)",
    )
    command.add_argument("--similarity", choices=("cos", "dot"), help="default: the model's own")


def _add_fit_reference(commands: Any) -> None:
    command = commands.add_parser(
        "fit-reference",
        help="make a model exact without training: fit a reference and fold its shift",
        description="Fit the reference of a model, whose weights are not touched, and write the "
        "exact model: a folder that sentence-transformers loads without xsiam.",
    )
    command.add_argument("--model", default=_DEFAULT_MODEL, help="name, folder or checkpoint")
    command.add_argument("--output", type=Path, required=True, help="folder of the exact model")
    command.add_argument(
        "--texts",
        type=Path,
        help="unlabelled texts, one a line, whose pairwise scores shall be kept (default: none)",
    )
    command.add_argument("--role", help="role of the texts")
    command.add_argument(
        "--max-norm", type=float, default=1.0, help="bound on |c|, in units of PAD's (1.0)"
    )
    command.add_argument("--starts", type=int, default=4, help="starts that are followed (4)")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--similarity", choices=("cos", "dot"), help="default: the model's own")
    command.set_defaults(run=_fit_reference)


def _add_upload(commands: Any) -> None:
    command = commands.add_parser(
        "upload",
        help="upload an exported model to the Hugging Face hub",
        description="Upload the folder of an exported model, all files of it. No other command "
        "sends anything anywhere. Log in with `hf auth login`, or set HF_TOKEN.",
    )
    command.add_argument("folder", type=Path, metavar="FOLDER", help="such as runs/mine/export")
    command.add_argument("repo_id", metavar="REPO_ID", help="owner/name; it is made if need be")
    command.add_argument("--private", action="store_true", help="only you can see it")
    command.add_argument("--revision", help="branch, made if need be (default: main)")
    command.add_argument("--message", help="of the commit")
    command.set_defaults(run=_upload)


def _add_index(commands: Any) -> Any:
    """Add the commands about an index, and return them."""
    index = commands.add_parser(
        "index",
        help="keep the token vectors of many texts on disk, and explain scores with them",
        description="Build an index of token vectors once; then explain any query against it.",
    )
    index_commands = index.add_subparsers(required=True, metavar="COMMAND")
    build = index_commands.add_parser(
        "build",
        help="integrate the token vectors of a file of texts",
        description="Write an index. The same command goes on after an interruption; under "
        "torchrun every process computes its share.",
    )
    build.add_argument("--texts", type=Path, required=True, help="one text a line, UTF-8")
    build.add_argument("--output", type=Path, required=True, help="the folder; it holds the texts")
    _add_attributor(build)
    build.add_argument("--role", help="query, document or the name of a prompt")
    build.add_argument("--dtype", choices=("float16", "float32"), default="float16")
    build.add_argument("--shard-size", type=int, default=256, help="texts of a file")
    build.set_defaults(run=_index_build)
    explain = index_commands.add_parser(
        "explain",
        help="split the scores of a query with indexed texts over their tokens",
        description="Print attributions of a query with texts of an index, whose layer, "
        "reference, shift and similarity are taken.",
    )
    explain.add_argument("query", metavar="QUERY")
    explain.add_argument("--index", type=Path, required=True, help="the folder")
    explain.add_argument("--docs", required=True, help="ids from 0, such as 0,5")
    explain.add_argument("--model", default=_DEFAULT_MODEL, help="the one it was built with")
    explain.add_argument("--max-nodes", type=int, default=4096)
    explain.add_argument("--role", help="role of the query")
    explain.add_argument("--top", type=int, default=5, help="strongest pairs to list (default: 5)")
    explain.set_defaults(run=_index_explain)
    return index_commands


def _train(arguments: argparse.Namespace) -> None:
    from xsiam.config import TrainConfig, load_config

    files, overrides = _split_settings(arguments.settings)
    config = load_config(TrainConfig, files, overrides)
    from xsiam.training import run_training

    _hide_loading_bars()
    result = run_training(config)
    if result.is_first_process:
        for key, value in result.metrics.items():
            if key.startswith(("val/", "test/")):
                print(f"{key:22} {value:.4f}")
        print(f"best checkpoint  {result.best_checkpoint}")
        print(f"last checkpoint  {result.last_checkpoint}")
        print(f"exported model   {result.export}")
        print(f"results          {result.results_path}")
        print(f"TensorBoard      tensorboard --logdir {result.tensorboard_dir}")


def _evaluate(arguments: argparse.Namespace) -> int:
    from xsiam.config import EvaluateConfig, load_config

    files, overrides = _split_settings(arguments.settings)
    config = load_config(EvaluateConfig, files, overrides)
    from xsiam.evaluation import run_evaluation

    _hide_loading_bars()
    result = run_evaluation(config)
    return 1 if result is not None and result.failed else 0


def _explain(arguments: argparse.Namespace) -> None:
    from xsiam.report import print_attribution

    _hide_loading_bars()
    if arguments.plot is not None:
        from xsiam.plots import check_picture, plot_attribution, save_figure

        check_picture(arguments.plot)
    result = _attributor(arguments).attribute(
        arguments.text_a, arguments.text_b, arguments.role_a, arguments.role_b
    )
    if arguments.save is not None:
        arguments.save.parent.mkdir(parents=True, exist_ok=True)
        result.save(arguments.save)
    print_attribution(result, top=arguments.top)
    if arguments.plot is not None:
        print(f"heat map: {save_figure(plot_attribution(result)[0], arguments.plot)}")


def _attributor(arguments: argparse.Namespace) -> PairAttributor:
    """Load the model and make the attributor that a command asks for."""
    from xsiam.attribution import PairAttributor
    from xsiam.encoder import SiameseEncoder
    from xsiam.pretrained import records_shift

    shift = arguments.shift
    if shift is None and not records_shift(arguments.model):
        shift = False
    encoder = SiameseEncoder.from_pretrained(
        arguments.model,
        shift=shift,
        reference=arguments.reference,
        similarity=arguments.similarity,
        device=_own_device(),
    )
    layer = max(0, encoder.n_layers - 2) if arguments.layer is None else arguments.layer
    return PairAttributor(
        encoder, layer, tolerance=arguments.tolerance, max_nodes=arguments.max_nodes
    )


def _fit_reference(arguments: argparse.Namespace) -> None:
    from xsiam.encoder import SiameseEncoder
    from xsiam.references import fit_reference

    texts = None if arguments.texts is None else _read_lines(arguments.texts)
    _hide_loading_bars()
    plain = SiameseEncoder.from_pretrained(
        arguments.model, shift=False, reference="pad", similarity=arguments.similarity
    )
    reference = fit_reference(
        plain,
        texts,
        role=arguments.role,
        max_norm=arguments.max_norm,
        n_starts=arguments.starts,
        seed=arguments.seed,
        progress=sys.stderr.isatty(),
    )
    exact = SiameseEncoder(
        plain.model,
        similarity=plain.similarity,
        shift=True,
        reference=reference,
        normalize=plain.normalize,
    )
    exact.save_pretrained(arguments.output)
    report = reference.report
    assert report is not None
    kept = "unknown: no texts were given"
    if report.score_difference is not None:
        kept = f"{report.score_difference:.4f} root mean square, {report.n_texts} texts"
    print(
        f"|e(c)| {report.residual:.4g}, {report.relative_residual:.2%} of a short text's embedding"
    )
    print(f"|c| {report.norm:.3g} of PAD's" + (" (at the bound)" if report.at_bound else ""))
    print(f"change of scores: {kept}")
    print(f"exact model: {arguments.output}")


def _upload(arguments: argparse.Namespace) -> None:
    from xsiam.upload import upload_model

    url = upload_model(
        arguments.folder,
        arguments.repo_id,
        private=arguments.private,
        revision=arguments.revision,
        message=arguments.message,
    )
    print(f"uploaded: {url}")


def _own_device() -> str | None:
    """Return this process's GPU under torchrun; None leaves the choice to the model."""
    import torch

    own = os.environ.get("LOCAL_RANK")
    return f"cuda:{own}" if own is not None and torch.cuda.is_available() else None


def _index_build(arguments: argparse.Namespace) -> None:
    from xsiam.index import TokenVectorIndex

    texts = _read_lines(arguments.texts)
    _hide_loading_bars()
    index = TokenVectorIndex.build(
        _attributor(arguments),
        texts,
        arguments.output,
        role=arguments.role,
        dtype=arguments.dtype,
        shard_size=arguments.shard_size,
        progress=sys.stderr.isatty(),
    )
    if missing := index.missing:
        print(f"{len(missing)} shards are left to other processes")
        return
    converged = int(index.converged.sum())
    print(f"{len(index)} texts in {arguments.output}, {converged} converged")


def _index_explain(arguments: argparse.Namespace) -> None:
    from xsiam.report import print_attribution

    ids = _read_ids(arguments.docs, "--docs")
    _hide_loading_bars()
    index = _open_index(arguments)
    for i, result in zip(ids, index.explain(arguments.query, ids, arguments.role), strict=True):
        print(f"text {i}: {result.text_b}")
        print_attribution(result, top=arguments.top)
        print()


def _open_index(arguments: argparse.Namespace) -> TokenVectorIndex:
    """Open an index with an attributor of its own settings."""
    from xsiam.index import TokenVectorIndex

    manifest = TokenVectorIndex.load(arguments.index).manifest
    for name in ("layer", "shift", "similarity", "tolerance"):
        setattr(arguments, name, getattr(manifest.settings, name))
    arguments.reference = manifest.reference()
    return TokenVectorIndex(arguments.index, manifest, _attributor(arguments))


def _rank(arguments: argparse.Namespace) -> None:
    from xsiam.ranking import explain_ranking
    from xsiam.report import print_ranking

    relevant = () if arguments.relevant is None else _read_ids(arguments.relevant, "--relevant")
    against = arguments.against
    if against is not None and against.lstrip("-").isdigit():
        against = int(against)
    documents = None
    if arguments.documents is not None:
        documents = _read_lines(arguments.documents, "--documents")
    _hide_loading_bars()
    found = explain_ranking(
        _open_index(arguments) if documents is None else _attributor(arguments),
        arguments.query,
        documents,
        relevant=relevant,
        against=against,
        top_k=arguments.top,
        role_query=arguments.role_query,
        role_documents=arguments.role_documents,
    )
    if arguments.html is not None:
        from xsiam.page import whole_page

        arguments.html.parent.mkdir(parents=True, exist_ok=True)
        arguments.html.write_text(whole_page(found.to_html(), found.query), encoding="utf-8")
    print_ranking(found)
    if arguments.html is not None:
        print(f"page: {arguments.html}")


def _read_lines(path: Path, option: str = "--texts") -> list[str]:
    """Read a file of one text a line."""
    from xsiam.errors import InputError

    try:
        texts = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"Expected `{option}` to be a file in UTF-8, but reading {str(path)!r} failed: {error}."
        ) from error
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            raise InputError(
                f"Expected a text on every line of {str(path)!r}, but line {number} is empty. "
                "Remove it."
            )
    return texts


def _read_ids(value: str, option: str) -> list[int]:
    """Read ids such as "0,5"."""
    from xsiam.errors import InputError

    try:
        return [int(part) for part in value.split(",")]
    except ValueError as error:
        raise InputError(
            f"Expected `{option}` to be ids of texts such as 0,5, but got {value!r}."
        ) from error


def _split_settings(settings: Sequence[str]) -> tuple[list[str], list[str]]:
    """Tell YAML files from key=value overrides."""
    files = [setting for setting in settings if "=" not in setting]
    return files, [setting for setting in settings if "=" in setting]


def _is_users(error: Exception) -> bool:
    """Whether an error is a message to the user, and no fault of the program."""
    from xsiam.errors import HubError, InputError, ModelError, ProcessError

    users = InputError | ModelError | HubError | ProcessError | FileNotFoundError
    return isinstance(error, users)


def _hide_loading_bars() -> None:
    """Switch off the bars that transformers draws for every weight file."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


@contextmanager
def _own_warnings() -> Iterator[None]:
    """Show our warnings as one line each."""
    from xsiam.errors import ConvergenceWarning, TruncationWarning

    show = warnings.showwarning

    def one_line(message: Any, category: type[Warning], *rest: Any, **more: Any) -> None:
        if issubclass(category, ConvergenceWarning | TruncationWarning):
            print(f"warning: {message}", file=sys.stderr)
        else:
            show(message, category, *rest, **more)

    with warnings.catch_warnings():
        # torch deprecates what its own forward-mode differentiation calls.
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated")
        warnings.simplefilter("always", ConvergenceWarning)
        warnings.simplefilter("always", TruncationWarning)
        warnings.showwarning = one_line
        yield


if __name__ == "__main__":
    raise SystemExit(main())
