"""Train a Siamese encoder: ``python train.py configs/quickstart.yaml key=value …``.

The same as ``xsiam train``. Several processes (``trainer.devices=2``) run this very script.
"""

import sys

from xsiam.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
