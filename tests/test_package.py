"""The package as users get it: light import, public names, and what the wheel holds."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import xsiam

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "lightning", "datasets", "sentence_transformers", "transformers", "omegaconf")


def run_python(code: str) -> str:
    """Run code in a fresh interpreter at the repository root, and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_loads_nothing_heavy() -> None:
    code = f"import sys, xsiam; print([name for name in {HEAVY} if name in sys.modules])"
    assert run_python(code) == "[]"


def test_errors_and_configuration_load_nothing_heavy() -> None:
    """`xsiam --help` and a mistyped key answer at once."""
    heavy = HEAVY[:-1]
    code = (
        "import sys, xsiam, xsiam.config; xsiam.InputError; xsiam.config.load_config("
        "xsiam.config.TrainConfig, ['configs/quickstart.yaml'], ['seed=1']);"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    assert run_python(code) == "[]"


@pytest.mark.parametrize("name", xsiam.__all__)
def test_every_public_name_resolves(name: str) -> None:
    value = getattr(xsiam, name)
    assert getattr(value, "__name__", name) in (name, "str")


def test_names_are_listed_and_unknown_ones_refused() -> None:
    assert set(xsiam.__all__) <= set(dir(xsiam))
    assert sorted(xsiam.__all__) == list(xsiam.__all__)
    with pytest.raises(AttributeError, match="'xsiam' has no attribute 'Missing'"):
        xsiam.Missing  # noqa: B018 - looking the name up is the test


def test_wheel_holds_the_whole_package(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir"]
    done = subprocess.run(
        [*command, str(tmp_path), str(ROOT)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob(f"xsiam-{xsiam.__version__}-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(f"xsiam-{xsiam.__version__}.dist-info/METADATA").decode()
        scripts = archive.read(f"xsiam-{xsiam.__version__}.dist-info/entry_points.txt").decode()
    expected = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "xsiam").rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".pyo")
    }
    assert {"xsiam/py.typed", "xsiam/probes/pairs/train.csv"} <= expected
    inside = {name for name in names if not name.startswith("xsiam-")}
    assert inside == expected
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "xsiam = xsiam.cli:main" in scripts
    for extra in ("offline", "peft", "nlp", "bench", "dev"):
        assert f"Provides-Extra: {extra}" in metadata
