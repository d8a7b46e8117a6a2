"""Read a table of texts from a file, a saved dataset or the hub, every cell as it was written.

CSV, TSV and JSON are parsed with the standard library and not by the loaders of ``datasets``: those
guess types (the text "NA" becomes missing, "1.5" a number, a number among texts a text), lose the
line number that an error message needs, and serve files from a cache. Saved datasets and hub names
go through ``datasets``.
"""

from __future__ import annotations

import csv
import difflib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xsiam.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

BUNDLED = "bundled"
"""Source name of the pair set that comes with xsiam."""

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")
"""Endings of the files that can be read."""

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.-]+)?")


@dataclass(frozen=True)
class Table:
    """Columns of equal length, as read.

    Attributes:
        columns: values by column name; cells of CSV and TSV are always strings.
        name: what to call the table in messages.
        lines: line of the file on which each row starts, where rows are lines.
    """

    columns: dict[str, list[Any]]
    name: str
    lines: tuple[int, ...] | None = None

    @property
    def n_rows(self) -> int:
        """Number of data rows; a header is none."""
        return len(next(iter(self.columns.values()))) if self.columns else 0

    def where(self, row: int) -> str:
        """Say where the row with index `row` is; messages count data rows from 1."""
        line = f" (line {self.lines[row]})" if self.lines else ""
        return f"data row {row + 1}{line} of {self.name}"


def is_file_name(source: str | Path) -> bool:
    """Return whether `source` is a file or ends like one that can be read."""
    path = Path(source).expanduser()
    return path.is_file() or path.suffix.lower() in SUFFIXES


def is_hub_name(source: str | Path) -> bool:
    """Return whether `source` can only be a dataset on the hub: ``owner/name[:config]``."""
    if not isinstance(source, str) or is_file_name(source) or Path(source).exists():
        return False
    return _HUB_NAME.fullmatch(source) is not None


def split_names(source: str | Path, *, key: str = "source") -> tuple[str, ...]:
    """Return the names of the splits that `source` holds; a plain file has none."""
    if source == BUNDLED:
        from xsiam.probes import SPLITS

        return tuple(SPLITS)
    if is_hub_name(source):
        import datasets

        name, config = _hub_parts(str(source))
        with _hub_errors(str(source), key), _quiet_datasets():
            return tuple(str(split) for split in datasets.get_dataset_split_names(name, config))
    path = Path(source).expanduser()
    if path.is_dir():
        saved = _load_saved(path, key)
        return tuple(saved) if isinstance(saved, dict) else (str(saved.split or "train"),)
    return ()


def read_table(source: str | Path, split: str | None = None, *, key: str = "source") -> Table:
    """Read one table.

    Args:
        source: a CSV, TSV, JSONL, JSON or Parquet file; a folder written by
            ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk``; "bundled"; or a hub name
            ``owner/name`` or ``owner/name:config``, the only case in which the network is used.
        split: which split, for a source that has several. Files and single datasets ignore it.
        key: the configuration key or argument that `source` came from, for messages.

    Raises:
        InputError: the source does not exist, is empty or damaged, or has no such split.
    """
    if not str(source).strip():
        raise InputError(f"Expected a file or dataset name, but got {source!r}. Set `{key}`.")
    if source == BUNDLED:
        return _read_bundled(split, key)
    if is_hub_name(source):
        return _read_hub(str(source), split, key)
    path = Path(source).expanduser()
    if path.is_dir():
        return _read_saved(path, split, key)
    if not path.is_file():
        raise InputError(_missing(source, path, key))
    return _read_file(path, key)


def suggest(name: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the closest of the `known` names, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def _missing(source: str | Path, path: Path, key: str) -> str:
    """Return the message for a source that is nowhere."""
    near = ""
    if path.parent.is_dir():
        near = suggest(path.name, (other.name for other in path.parent.iterdir()))
    return (
        f"Expected `{key}` to be a file ({', '.join(SUFFIXES)}), a saved dataset folder, "
        f"{BUNDLED!r} or a hub name like 'owner/name', but {str(source)!r} does not exist "
        f"(looked for {str(path.absolute())!r}).{near} Set `{key}`."
    )


def _read_file(path: Path, key: str) -> Table:
    """Read a file by its ending."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(
            f"Expected `{key}` to end in one of {', '.join(SUFFIXES)}, but got {str(path)!r}. "
            f"Rename or convert it and set `{key}`."
        )
    if path.stat().st_size == 0:
        raise InputError(f"Expected `{key}` to hold data, but {str(path)!r} is an empty file.")
    if suffix == ".parquet":
        return _read_parquet(path)
    try:
        if suffix in (".csv", ".tsv"):
            return _read_delimited(path, "\t" if suffix == ".tsv" else ",")
        return _read_json(path)
    except UnicodeDecodeError as error:
        raise InputError(
            f"Expected {str(path)!r} to be UTF-8 text, but byte {error.start} is "
            f"{error.object[error.start]:#04x}. Save the file as UTF-8."
        ) from error


def _read_delimited(path: Path, delimiter: str) -> Table:
    """Read CSV or TSV with a header; blank lines are skipped and every cell stays a string."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        records = _records(path, file, delimiter)
        _, header = next(records, (1, []))
        if not header:
            raise InputError(f"Expected {str(path)!r} to start with a header, but it is blank.")
        _check_header(header, path)
        rows: list[list[str]] = []
        lines: list[int] = []
        for line, record in records:
            if len(record) != len(header):
                raise InputError(
                    f"Expected {len(header)} cells as in the header, but data row {len(rows) + 1} "
                    f"(line {line}) of {str(path)!r} has {len(record)}. Put double quotes around a "
                    f"text that contains {delimiter!r} or a line break."
                )
            rows.append(record)
            lines.append(line)
    cells = zip(*rows, strict=True) if rows else [()] * len(header)
    columns = {name: list(values) for name, values in zip(header, cells, strict=True)}
    return Table(columns, str(path), tuple(lines))


def _records(path: Path, file: Iterable[str], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the line on which a record starts and its cells, without blank lines."""
    # strict: a stray quote is an error here; otherwise it silently swallows the lines that follow.
    reader = csv.reader(file, delimiter=delimiter, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise InputError(
                f"Expected {str(path)!r} to be well-formed, but the record at line {line} is not: "
                f"{error}. Quote the text and double the quotes inside it, or save as JSONL."
            ) from error
        if record:
            yield line, record


def _check_header(header: Sequence[str], path: Path) -> None:
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise InputError(
            f"Expected every column once, but {str(path)!r} has {twice[0]!r} "
            f"{header.count(twice[0])} times. Rename one."
        )


def _read_json(path: Path) -> Table:
    """Read an array of objects, or one object a line; a key that a row lacks is None there."""
    text = path.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        try:
            objects = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(_bad_json(path, error.lineno, error)) from error
        return _from_objects(objects, str(path), None)
    objects, lines = [], []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            objects.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise InputError(_bad_json(path, number, error)) from error
        lines.append(number)
    return _from_objects(objects, str(path), tuple(lines))


def _bad_json(path: Path, line: int, error: json.JSONDecodeError) -> str:
    return (
        f"Expected {str(path)!r} to be one JSON object a line or an array of objects, but line "
        f"{line} is not valid JSON: {error.msg}."
    )


def _from_objects(objects: list[Any], name: str, lines: tuple[int, ...] | None) -> Table:
    """Turn rows into columns."""
    columns: dict[str, list[Any]] = {}
    for row, item in enumerate(objects):
        if not isinstance(item, dict):
            place = Table({}, name, lines).where(row)
            raise InputError(
                f"Expected every row to be a JSON object, but {place} is {str(item)[:60]!r}."
            )
        columns.update({key: [] for key in item if key not in columns})
    for key, values in columns.items():
        values.extend(item.get(key) for item in objects)
    return Table(columns, name, lines)


def _read_parquet(path: Path) -> Table:
    """Read a Parquet file."""
    import pyarrow.parquet
    from pyarrow import ArrowException

    try:
        table = pyarrow.parquet.read_table(path)
    except (ArrowException, OSError) as error:
        raise InputError(
            f"Expected {str(path)!r} to be a Parquet file, but it cannot be read: {error}"
        ) from error
    return Table(table.to_pydict(), str(path))


def _read_bundled(split: str | None, key: str) -> Table:
    """Read a split of the pairs that come with xsiam."""
    from xsiam import probes

    chosen = _check_split(split, tuple(probes.SPLITS), BUNDLED, key)
    return _read_file(Path(probes.path(chosen)), key)


def _read_saved(path: Path, split: str | None, key: str) -> Table:
    """Read a folder written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""
    saved = _load_saved(path, key)
    if not isinstance(saved, dict):
        return _from_dataset(saved, str(path))
    chosen = _check_split(split, tuple(saved), str(path), key)
    return _from_dataset(saved[chosen], f"{path}[{chosen}]")


def _load_saved(path: Path, key: str) -> Dataset | DatasetDict:
    import datasets

    try:
        with _quiet_datasets():
            return datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"Expected `{key}` to be a folder saved with `Dataset.save_to_disk`, but "
            f"{str(path)!r} cannot be read as one: {error} To read a file in it, set `{key}` to it."
        ) from error


def _read_hub(source: str, split: str | None, key: str) -> Table:
    """Load a split from the hub."""
    import datasets

    chosen = _check_split(split, split_names(source, key=key), source, key, slices=True)
    name, config = _hub_parts(source)
    with _hub_errors(source, key), _quiet_datasets():
        dataset = datasets.load_dataset(name, config, split=chosen)
    return _from_dataset(dataset, f"{source}[{chosen}]")


def _hub_parts(source: str) -> tuple[str, str | None]:
    name, _, config = source.partition(":")
    return name, config or None


def _check_split(
    split: str | None, known: tuple[str, ...], name: str, key: str, *, slices: bool = False
) -> str:
    """Return the split to read; `slices` allows ``train[:100]``, which the hub loader knows."""
    listed = ", ".join(known)
    if split is None:
        if len(known) == 1:
            return known[0]
        raise InputError(f"Expected a split of {name!r}, but none was given. It has: {listed}.")
    if (split.partition("[")[0] if slices else split) not in known:
        raise InputError(
            f"Expected `{key}` to be a split of {name!r} ({listed}), but got {split!r}."
            f"{suggest(split, known)} Set `{key}`."
        )
    return split


def _from_dataset(dataset: Dataset, name: str) -> Table:
    # The arrow format honours a selection and decodes nothing.
    return Table(dataset.with_format("arrow")[:].to_pydict(), name)


@contextmanager
def _hub_errors(source: str, key: str) -> Iterator[None]:
    """Turn what the hub loader raises into one error that names the source."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    # DatasetsError covers missing datasets; OSError the network; ValueError configs and splits.
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"Expected `{key}` to be an existing file, a saved dataset folder or a dataset on the "
            f"hub, but there is no such file and the hub gave nothing for {source!r}: {error} "
            f"Set `{key}`, to 'owner/name:config' where the dataset has several configurations."
        ) from error


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Keep the progress bars and log lines of ``datasets`` off the screen meanwhile."""
    import datasets
    from datasets.utils import logging

    bars, level = datasets.are_progress_bars_disabled(), logging.get_verbosity()
    datasets.disable_progress_bars()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()
