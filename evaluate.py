"""Evaluate a model: `python evaluate.py checkpoint=best.ckpt data.test=test.csv`."""

from __future__ import annotations

import sys

from xsiam.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["evaluate", *sys.argv[1:]]))
