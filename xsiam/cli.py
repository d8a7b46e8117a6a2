"""The `xsiam` command: train, evaluate, explain.

Only the standard library is imported here, so that ``xsiam --help`` answers at once; each command
imports what it needs.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from xsiam import __version__

_USER_ERROR = 2
_INTERRUPTED = 130
_DEFAULT_MODEL = "all-MiniLM-L6-v2"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 2 for a user error, 130 after Ctrl-C.

    Args:
        argv: Arguments without the program's name; None takes those of the process.
    """
    arguments = _parser().parse_args(sys.argv[1:] if argv is None else list(argv))
    try:
        with _own_warnings():
            arguments.run(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _INTERRUPTED
    except (ValueError, FileNotFoundError) as error:
        if arguments.debug or not _is_users(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return _USER_ERROR
    return 0


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
    for command in commands.choices.values():
        command.add_argument("--debug", action="store_true", help="show tracebacks of user errors")
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
    explain.add_argument("--model", default=_DEFAULT_MODEL, help="name, folder or checkpoint")
    explain.add_argument("--layer", type=int, help="0 … L (default: L-2)")
    explain.add_argument("--tolerance", type=float, default=1e-3)
    explain.add_argument("--max-nodes", type=int, default=4096)
    explain.add_argument("--reference", help="pad or uniform (default: the model's, else pad)")
    explain.add_argument(
        "--shift",
        action=argparse.BooleanOptionalAction,
        help="subtract the reference embedding (default: as the model was trained, else no)",
    )
    explain.add_argument("--similarity", choices=("cos", "dot"), help="default: the model's own")
    explain.add_argument("--role-a", help="query, document or the name of a prompt")
    explain.add_argument("--role-b")
    explain.add_argument("--plot", type=Path, metavar="FILE.png", help="write a heat map")
    explain.add_argument("--save", type=Path, metavar="FILE.safetensors", help="write the result")
    explain.add_argument("--top", type=int, default=5, help="strongest pairs to list (default: 5)")
    explain.set_defaults(run=_explain)


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


def _evaluate(arguments: argparse.Namespace) -> None:
    from xsiam.config import EvaluateConfig, load_config

    files, overrides = _split_settings(arguments.settings)
    config = load_config(EvaluateConfig, files, overrides)
    from xsiam.evaluation import run_evaluation

    _hide_loading_bars()
    run_evaluation(config)


def _explain(arguments: argparse.Namespace) -> None:
    from xsiam.attribution import PairAttributor
    from xsiam.encoder import SiameseEncoder
    from xsiam.pretrained import records_shift
    from xsiam.report import print_attribution

    _hide_loading_bars()
    if arguments.plot is not None:
        from xsiam.plots import check_picture, plot_attribution, save_figure

        check_picture(arguments.plot)
    shift = arguments.shift
    if shift is None and not records_shift(arguments.model):
        shift = False
    encoder = SiameseEncoder.from_pretrained(
        arguments.model,
        shift=shift,
        reference=arguments.reference,
        similarity=arguments.similarity,
    )
    layer = max(0, encoder.n_layers - 2) if arguments.layer is None else arguments.layer
    attributor = PairAttributor(
        encoder, layer, tolerance=arguments.tolerance, max_nodes=arguments.max_nodes
    )
    result = attributor.attribute(
        arguments.text_a, arguments.text_b, arguments.role_a, arguments.role_b
    )
    if arguments.save is not None:
        arguments.save.parent.mkdir(parents=True, exist_ok=True)
        result.save(arguments.save)
    print_attribution(result, top=arguments.top)
    if arguments.plot is not None:
        print(f"heat map: {save_figure(plot_attribution(result)[0], arguments.plot)}")


def _split_settings(settings: Sequence[str]) -> tuple[list[str], list[str]]:
    """Tell YAML files from key=value overrides."""
    files = [setting for setting in settings if "=" not in setting]
    return files, [setting for setting in settings if "=" in setting]


def _is_users(error: Exception) -> bool:
    """Whether an error is a message to the user, and no fault of the program."""
    from xsiam.errors import InputError, ModelError

    return isinstance(error, InputError | ModelError | FileNotFoundError)


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
