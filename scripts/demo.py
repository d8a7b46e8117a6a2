"""Train, evaluate and explain with real weights: what `make demo` runs."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from xsiam.cli import main

ROOT = Path(__file__).resolve().parent.parent
RUN, EVALUATION = Path("runs/demo"), Path("eval/demo")
BEST = RUN / "checkpoints" / "best.ckpt"
LAYER = 5
PAIRS = (
    ("The dog runs after the kitten.", "Outside in the garden a cat is chased by the dog."),
    ("The soup is delicious.", "This is not a tasty soup."),
    ("A woman repairs the old bicycle.", "An engineer is fixing a bike."),
)


def step(title: str, *arguments: str) -> None:
    """Show and run one xsiam command, and stop the demo where it fails."""
    print(f"\n== {title}\n$ xsiam {' '.join(arguments)}\n", flush=True)
    code = main(list(arguments))
    if code != 0:
        sys.exit(code)


def run() -> None:
    """Run the three commands one after the other."""
    for folder in (RUN, EVALUATION):
        shutil.rmtree(folder, ignore_errors=True)
    train = ("train", str(ROOT / "configs" / "quickstart.yaml"), f"output_dir={RUN}")
    step("Train an exact model", *train)
    data = ("data.name=bundled", "data.test=test")
    sample = (f"attribution.layers={LAYER}", "attribution.n_pairs=20")
    evaluate = ("evaluate", f"checkpoint={BEST}", *data, *sample, f"output_dir={EVALUATION}")
    step("Evaluate its best checkpoint", *evaluate)
    for index, (text_a, text_b) in enumerate(PAIRS, start=1):
        picture = str(EVALUATION / f"explain_{index}.png")
        options = ("--model", str(BEST), "--layer", str(LAYER), "--plot", picture)
        step(f"Explain a pair ({index} of {len(PAIRS)})", "explain", text_a, text_b, *options)
    tensorboard = Path(sys.executable).parent / "tensorboard"
    print("\n== Done")
    print(f"Checkpoint      {BEST}")
    print(f"Exported model  {RUN / 'export'}")
    print(f"TensorBoard     {tensorboard} --logdir {RUN}")
    print("Pictures")
    for picture in sorted(EVALUATION.rglob("*.png")):
        print(f"                {picture}")


if __name__ == "__main__":
    run()
