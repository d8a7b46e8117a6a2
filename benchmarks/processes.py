"""Run a script that answers cases one by one; its crash or delay costs one case, not the run."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
_POLL = 0.1  # seconds


class Script:
    """A script called as ``python script REQUEST ANSWERS``.

    It reads a request, JSON with a list of ``cases``, and appends one line of JSON for each to its
    answers.

    Args:
        python: The interpreter, with what the script imports.
        path: The script.
        request: What goes into every request beside the cases.
        timeout: Seconds for one case.
        folder: Working folder, or None for this process's.
    """

    def __init__(
        self,
        python: str | Path,
        path: Path,
        request: Row,
        timeout: float,
        folder: Path | None = None,
    ) -> None:
        self.command = [str(python), str(path.resolve())]
        self.request = request
        self.timeout = timeout
        self.folder = folder

    def answers(self, cases: Sequence[Row]) -> Iterator[Row]:
        """Yield one answer for each case in turn, as soon as there is one.

        Where the script ends or takes too long, the answer is ``{"status": "failed" or "timeout",
        "note": …}`` and the rest is given to a new process.
        """
        remaining = list(cases)
        while remaining:
            for row in self._one_process(remaining):
                remaining.pop(0)
                yield row

    def _one_process(self, cases: Sequence[Row]) -> Iterator[Row]:
        """Yield the answers of one process, and at most one of a failure."""
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "request").write_text(json.dumps({**self.request, "cases": list(cases)}))
            answers, errors = folder / "answers", folder / "errors"
            answers.touch()
            with errors.open("w") as stream:
                process = subprocess.Popen(
                    [*self.command, str(folder / "request"), str(answers)],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=stream,
                    cwd=self.folder,
                    env=self._environment(),
                )
                n, late = 0, False
                try:
                    for row in self._follow(process, answers):
                        n += 1
                        yield row
                        if n == len(cases):
                            break
                    late = process.poll() is None
                finally:
                    self._end(process)
            if n < len(cases):
                yield self._failure(process.returncode, errors, late)

    def _follow(self, process: subprocess.Popen[bytes], answers: Path) -> Iterator[Row]:
        """Yield lines as they appear; return at the end of the process or of a case's time."""
        seen, since = 0, time.monotonic()
        while True:
            ended = process.poll() is not None  # before reading: what it wrote last is read too
            lines = answers.read_text(encoding="utf-8").split("\n")[:-1]
            for line in lines[seen:]:
                yield json.loads(line)
                since = time.monotonic()
            seen = len(lines)
            if ended or time.monotonic() - since > self.timeout:
                return
            time.sleep(_POLL)

    def _failure(self, code: int, errors: Path, late: bool) -> Row:
        if late:
            return {"status": "timeout", "note": f"stopped after {self.timeout:.0f} s"}
        if code < 0:
            return {"status": "failed", "note": f"ended by signal {-code} (9: out of memory?)"}
        lines = [line for line in errors.read_text(errors="replace").splitlines() if line.strip()]
        return {"status": "failed", "note": lines[-1].strip() if lines else "ended without a word"}

    @staticmethod
    def _end(process: subprocess.Popen[bytes]) -> None:
        """Stop a process that still runs: it is through, or out of time."""
        if process.poll() is None:
            process.kill()
        process.wait()

    def _environment(self) -> dict[str, str]:
        threads = str(self.request["threads"])
        own = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        own |= {"TOKENIZERS_PARALLELISM": "false"}
        kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
        return {**kept, **own}
