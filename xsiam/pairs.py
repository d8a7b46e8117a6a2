"""Pairs of texts with checked labels, from any source that `xsiam.tables` reads.

`load_pairs` is the one way in: it finds the columns, checks every row and returns a `PairDataset`.
Nothing is repaired: an empty text, a label that is no number or one on another scale is an error
that names the row.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from numbers import Real
from pathlib import Path
from typing import Any, Literal

from torch.utils.data import Dataset

from xsiam.errors import InputError
from xsiam.tables import Table, read_table, suggest

TEXT_COLUMNS = (
    ("sentence1", "sentence2"),
    ("anchor", "positive"),
    ("query", "document"),
    ("query", "answer"),
    ("text_a", "text_b"),
)
"""Pairs of column names that are recognised."""

TEXT_COLUMN = ("text", "texts", "sentence", "sentences")
"""Names of a single column of texts that are recognised where one is enough."""

LABEL_COLUMNS = ("score", "scores", "label", "labels", "similarity")
"""Names of label columns that are recognised."""

NO_LABEL = "none"
"""Value of `column_label` that leaves labels out although there is a column of them."""

NEGATIVE_COLUMN = re.compile(r"negative(?:_(\d+))?", re.IGNORECASE)
"""Names of columns of hard negatives that are recognised; their numbers give the order."""

LabelRule = Literal["required", "optional", "forbidden", "unread"]
NegativeRule = Literal["required", "optional", "available", "forbidden", "unused"]


@dataclass(frozen=True, eq=False)
class PairDataset(Dataset[dict[str, list[Any]]]):
    """Pairs of texts, row by row.

    Indexing with a row number, or a list of them, gives the batch of these rows as plain lists
    under "a", "b", "index" and, where there are any, "label" and "negatives" (a list a column).

    Attributes:
        texts_a: first texts.
        texts_b: second texts, as many.
        labels: one float a pair, in the expected range; None for unlabelled data.
        extra: every other column of the source, by name; none where one column made the pairs.
        rows: number of each pair's data row in the source, counted from 1; of its first text where
            one column made the pairs.
        name: what was read.
        negatives: hard negatives of each pair, by column.
    """

    texts_a: list[str]
    texts_b: list[str]
    labels: list[float] | None = None
    extra: dict[str, list[Any]] = field(default_factory=dict)
    rows: list[int] = field(default_factory=list)
    name: str = "pairs"
    negatives: dict[str, list[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.texts_a)

    def __getitem__(self, index: int | Sequence[int]) -> dict[str, list[Any]]:
        """Return the rows at `index` as one batch of lists."""
        rows = [index] if isinstance(index, int) else list(index)
        batch: dict[str, list[Any]] = {
            "a": [self.texts_a[row] for row in rows],
            "b": [self.texts_b[row] for row in rows],
            "index": rows,
        }
        if self.labels is not None:
            batch["label"] = [self.labels[row] for row in rows]
        if self.negatives:
            batch["negatives"] = [[t[row] for row in rows] for t in self.negatives.values()]
        return batch

    @property
    def lengths(self) -> list[int]:
        """Characters in all texts of each pair, an approximate length that costs nothing."""
        columns = (self.texts_a, self.texts_b, *self.negatives.values())
        return [sum(map(len, texts)) for texts in zip(*columns, strict=True)]

    def select(self, indices: Sequence[int]) -> PairDataset:
        """Return the pairs at `indices`, in that order."""

        def pick(values: list[Any]) -> list[Any]:
            return [values[index] for index in indices]

        return replace(
            self,
            texts_a=pick(self.texts_a),
            texts_b=pick(self.texts_b),
            labels=None if self.labels is None else pick(self.labels),
            extra={name: pick(values) for name, values in self.extra.items()},
            rows=pick(self.rows) if self.rows else [],
            negatives={name: pick(texts) for name, texts in self.negatives.items()},
        )


def text_id(text: str) -> int:
    """Return a number in int64 that is the same for equal texts, in every process and run.

    Among n distinct texts two share a number with a probability of about n² / 2⁶⁵.
    """
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def load_pairs(
    source: str | Path,
    split: str | None = None,
    *,
    column_a: str | None = None,
    column_b: str | None = None,
    column_label: str | None = None,
    columns_negative: Sequence[str] | None = None,
    labels: LabelRule = "required",
    negatives: NegativeRule = "unused",
    expected_range: tuple[float, float] = (0.0, 1.0),
    label_range: Sequence[float] | None = None,
    one_column: bool = False,
    key: str = "source",
) -> PairDataset:
    """Read pairs and check every row.

    Labels lie in `expected_range` or it is an error; they are rescaled only where `label_range`
    says on which scale they are, linearly, so that its ends become the ends of `expected_range`
    (with an infinite `expected_range` they are checked and kept).

    Args:
        source: file, saved dataset, "bundled" or hub name, see `xsiam.tables.read_table`.
        split: split of a source that has several.
        column_a: column of the first texts; None finds both columns by `TEXT_COLUMNS`.
        column_b: column of the second texts; named together with `column_a` or not at all.
        column_label: column of the labels; None finds it by `LABEL_COLUMNS`, "none" leaves it out.
        columns_negative: columns of hard negatives; None finds them by `NEGATIVE_COLUMN`, an empty
            list leaves them out.
        labels: "required": no labels are an error; "forbidden": labels are an error; "optional":
            either will do; "unread": they are left in `extra`, whatever they are. A column with
            labels in some rows only is an error but for the last.
        negatives: the same for hard negatives; "available": as optional, and a source may also lack
            all columns that are named; "unused": only columns that are named are an error, others
            are left in `extra`.
        expected_range: lowest and highest label the objective can take.
        label_range: lowest and highest label of the scale in the file.
        one_column: whether one column of texts is enough where there are no two: `column_a` without
            `column_b`, or one of `TEXT_COLUMN`. Texts that follow each other are then pairs, each
            in one of them; a last text without another has the first one. Such pairs have no
            labels.
        key: configuration key that `source` came from, for messages.

    Returns:
        The pairs, at least one.

    Raises:
        InputError: anything above is not met. Rows are counted from 1, the header not included.

    Example:
        >>> pairs = load_pairs("sts.csv", label_range=(0, 5))  # doctest: +SKIP
        >>> pairs.texts_a[0], pairs.labels[0]  # doctest: +SKIP
        ('A plane is taking off.', 1.0)
    """
    table = read_table(source, split, key=key)
    if table.n_rows == 0:
        raise InputError(
            f"Expected `{key}` to have at least one data row, but {table.name} has none."
        )
    if one_column and (name := _find_text(table, column_a, column_b)) is not None:
        return _follow_each_other(table, name)
    name_a, name_b = _find_texts(table, column_a, column_b, one_column)
    names_negative = _find_negatives(table, columns_negative, negatives, taken=(name_a, name_b))
    taken = (name_a, name_b, *names_negative)
    name_label = _find_label(table, column_label, labels, taken)
    values = None
    if name_label is not None:
        values = _read_labels(table, name_label, labels, expected_range, label_range)
    used = {*taken, name_label}
    return PairDataset(
        texts_a=_check_texts(table, name_a),
        texts_b=_check_texts(table, name_b),
        labels=values,
        extra={name: cells for name, cells in table.columns.items() if name not in used},
        rows=list(range(1, table.n_rows + 1)),
        name=table.name,
        negatives={name: _check_texts(table, name) for name in names_negative},
    )


def _find_text(table: Table, column_a: str | None, column_b: str | None) -> str | None:
    """Return the name of the only text column, or None where there are two or none."""
    if column_a is not None:
        return _require_column(table, column_a, "data.column_a") if column_b is None else None
    if column_b is not None or _by_convention(table, TEXT_COLUMNS):
        return None
    found = [name for (name,) in _by_convention(table, tuple((name,) for name in TEXT_COLUMN))]
    if len(found) > 1:
        raise InputError(
            f"Expected one column of texts, or two of pairs, but {table.name} has "
            f"{' and '.join(map(repr, found))}. Set `data.column_a`."
        )
    return found[0] if found else None


def _follow_each_other(table: Table, name: str) -> PairDataset:
    """Return pairs of texts of one column, the first with the second, the third with the fourth."""
    texts = _check_texts(table, name)
    if len(texts) < 2:
        raise InputError(
            f"Expected 2 texts or more in column {name!r}, of which pairs are made, but "
            f"{table.name} has {len(texts)}."
        )
    firsts, seconds = texts[::2], texts[1::2] + texts[: len(texts) % 2]
    return PairDataset(firsts, seconds, rows=list(range(1, len(texts) + 1, 2)), name=table.name)


def _find_texts(
    table: Table, column_a: str | None, column_b: str | None, one_column: bool
) -> tuple[str, str]:
    """Return the names of the two text columns."""
    if (column_a is None) != (column_b is None):
        raise InputError(
            "Expected `data.column_a` and `data.column_b` to be named together, but got "
            f"{column_a!r} and {column_b!r}. Set both or neither."
        )
    if column_a is not None and column_b is not None:
        if column_a == column_b:
            raise InputError(
                f"Expected two different text columns, but got {column_a!r} twice. "
                "Set `data.column_a` and `data.column_b`."
            )
        named_a = _require_column(table, column_a, "data.column_a")
        return named_a, _require_column(table, column_b, "data.column_b")
    found = _by_convention(table, TEXT_COLUMNS)
    known = ", ".join("/".join(pair) for pair in TEXT_COLUMNS)
    if not found:
        raise InputError(
            f"Expected two text columns called {known}, but {table.name} has {_columns(table)}."
            f"{_suggest_texts(table)} Set `data.column_a` and `data.column_b`"
            f"{_or_one(table, one_column)}."
        )
    if len(found) > 1:
        listed = " and ".join("/".join(pair) for pair in found)
        raise InputError(
            f"Expected one pair of text columns, but {table.name} has {listed}. "
            "Set `data.column_a` and `data.column_b`."
        )
    return found[0][0], found[0][1]


def _find_negatives(
    table: Table, named: Sequence[str] | None, rule: NegativeRule, taken: tuple[str, str]
) -> list[str]:
    """Return the names of the columns of hard negatives, in their order."""
    if rule == "available" and named and not any(name in table.columns for name in named):
        return []
    if named is None:
        found = [] if rule == "unused" else _negatives_by_convention(table)
    else:
        found = [_require_column(table, name, "data.columns_negative") for name in named]
    twice = [name for name in found if name in taken or found.count(name) > 1]
    if twice:
        raise InputError(
            f"Expected each column of negatives once and apart from the texts {taken[0]!r} and "
            f"{taken[1]!r}, but got {twice[0]!r} in {found}. Set `data.columns_negative`."
        )
    if rule == "required" and not found:
        raise InputError(
            "Expected columns of negatives (negative, negative_1, …), since the objective needs "
            f"them, but {table.name} has {_columns(table)} and `data.columns_negative` is {named}. "
            "Set `data.columns_negative`."
        )
    if rule in ("forbidden", "unused") and found:
        who = "the objective uses" if rule == "forbidden" else "these pairs are used with"
        raise InputError(
            f"Expected no columns of negatives, since {who} none, but {table.name} has "
            f"{', '.join(map(repr, found))}. Set `data.columns_negative=[]` to leave them out."
        )
    return found


def _negatives_by_convention(table: Table) -> list[str]:
    """Return the columns that are called negative, negative_1, …, in the order of the numbers."""
    numbered: dict[int, str] = {}
    for column in table.columns:
        match = NEGATIVE_COLUMN.fullmatch(column.strip())
        if match is None:
            continue
        number = int(match[1] or -1)
        if number in numbered:
            raise InputError(
                f"Expected columns of negatives with different numbers, but {table.name} has "
                f"{numbered[number]!r} and {column!r}. Set `data.columns_negative`."
            )
        numbered[number] = column
    return [numbered[number] for number in sorted(numbered)]


def _find_label(
    table: Table, column_label: str | None, labels: LabelRule, taken: tuple[str, ...]
) -> str | None:
    """Return the name of the label column, or None where there is none to read."""
    if column_label == NO_LABEL or labels == "unread":
        found: list[str] = []
    elif column_label is not None:
        found = [_require_column(table, column_label, "data.column_label")]
        if found[0] in taken:
            raise InputError(
                f"Expected a label column apart from the texts, but got {column_label!r}. "
                "Set `data.column_label`."
            )
    else:
        names = _by_convention(table, tuple((name,) for name in LABEL_COLUMNS))
        found = [name for (name,) in names if name not in taken]
    if labels == "required" and not found:
        raise InputError(
            f"Expected a label column ({', '.join(LABEL_COLUMNS)}), since the objective needs one, "
            f"but {table.name} has {_columns(table)} and `data.column_label` is {column_label!r}. "
            "Set `data.column_label`."
        )
    if labels == "forbidden" and found:
        raise InputError(
            f"Expected no label column, since the objective uses no labels, but {table.name} has "
            f"{found[0]!r}. Set `data.column_label={NO_LABEL}` to leave it out."
        )
    if len(found) > 1:
        raise InputError(
            f"Expected one label column, but {table.name} has {' and '.join(map(repr, found))}. "
            "Set `data.column_label`."
        )
    return found[0] if found else None


def _by_convention(table: Table, conventions: tuple[tuple[str, ...], ...]) -> list[tuple[str, ...]]:
    """Return the conventions that the table's columns meet, as they are spelled there."""
    found = [names for names in conventions if all(name in table.columns for name in names)]
    if found:
        return found
    spelled: dict[str, list[str]] = {}
    for column in table.columns:
        spelled.setdefault(column.strip().lower(), []).append(column)
    ambiguous = [spelled[n] for names in conventions for n in names if len(spelled.get(n, ())) > 1]
    if ambiguous:
        raise InputError(
            f"Expected column names that differ by more than case, but {table.name} has "
            f"{' and '.join(map(repr, ambiguous[0]))}. Set `data.column_a`, `data.column_b` and "
            "`data.column_label`."
        )
    met = [names for names in conventions if all(name in spelled for name in names)]
    return [tuple(spelled[name][0] for name in names) for names in met]


def _require_column(table: Table, name: str, key: str) -> str:
    if name not in table.columns:
        raise InputError(
            f"Expected `{key}` to be a column of {table.name} ({_columns(table)}), but got "
            f"{name!r}.{suggest(name, table.columns)} Set `{key}`."
        )
    return name


def _or_one(table: Table, one_column: bool) -> str:
    """Return what one column of texts is good for."""
    if one_column:
        return ", or `data.column_a` alone"
    alone = _by_convention(table, tuple((name,) for name in TEXT_COLUMN))
    return f"; one column ({alone[0][0]!r}) is enough for objective 'distillation'" if alone else ""


def _suggest_texts(table: Table) -> str:
    """Return a hint for the first conventional name that is spelled almost like a column."""
    for names in TEXT_COLUMNS:
        for name in names:
            if name not in table.columns and (hint := suggest(name, table.columns)):
                return f" No column is called {name!r}.{hint}"
    return ""


def _columns(table: Table) -> str:
    return "the columns " + ", ".join(map(repr, table.columns))


def _check_texts(table: Table, column: str) -> list[str]:
    """Return the texts unchanged; a row without text is an error."""
    for row, text in enumerate(table.columns[column]):
        if not isinstance(text, str):
            raise InputError(
                f"Expected column {column!r} to hold texts, but got {text!r} "
                f"({type(text).__name__}) in {table.where(row)}. Fix or remove that row."
            )
        if not text.strip():
            what = f"whitespace only ({text!r})" if text else "an empty text"
            raise InputError(
                f"Expected column {column!r} to hold texts, but got {what} in {table.where(row)}. "
                "Fix or remove that row."
            )
    return list(table.columns[column])


def _read_labels(
    table: Table,
    column: str,
    labels: LabelRule,
    expected_range: tuple[float, float],
    label_range: Sequence[float] | None,
) -> list[float] | None:
    """Return checked and, where asked for, rescaled labels; None for a column without any."""
    cells = table.columns[column]
    empty = [row for row, cell in enumerate(cells) if _is_empty(cell)]
    if len(empty) == len(cells) and labels == "optional":
        return None
    if empty:
        raise InputError(
            f"Expected a label in every row, but column {column!r} has none in "
            f"{table.where(empty[0])} ({len(empty)} of {len(cells)} rows have none). Fill them in, "
            f"remove these rows, or set `data.column_label={NO_LABEL}` to use no labels."
        )
    values = [_number(cell) for cell in cells]
    for row, value in enumerate(values):
        if value is None or not math.isfinite(value):
            raise InputError(
                f"Expected column {column!r} to hold finite numbers, but got {cells[row]!r} in "
                f"{table.where(row)}. Fix or remove that row."
            )
    numbers = [value for value in values if value is not None]
    low, high = _check_range(label_range) if label_range is not None else expected_range
    for row, value in enumerate(numbers):
        if not low <= value <= high:
            raise InputError(_out_of_range(table, column, row, numbers, (low, high), label_range))
    if label_range is None:
        return numbers
    return _rescaler((low, high), expected_range)(numbers)


def _is_empty(cell: Any) -> bool:
    return cell is None or (isinstance(cell, str) and not cell.strip())


def _number(cell: Any) -> float | None:
    """Return a cell as a number, or None where it is none; "1_0" and True are none."""
    if isinstance(cell, str):
        try:
            return None if "_" in cell else float(cell)
        except ValueError:
            return None
    if isinstance(cell, (Real, Decimal)) and not isinstance(cell, bool):
        return float(cell)
    return None


def _check_range(label_range: Sequence[float]) -> tuple[float, float]:
    """Return the two ends of the scale in the file."""
    values = [_number(value) for value in label_range]
    if len(values) == 2:
        low, high = values
        if low is not None and high is not None and -math.inf < low < high < math.inf:
            return low, high
    raise InputError(
        "Expected `data.label_range` to be two finite numbers, the lower first, but got "
        f"{list(label_range)}. Set `data.label_range=[0,5]`, for instance."
    )


def _out_of_range(
    table: Table,
    column: str,
    row: int,
    values: list[float],
    bounds: tuple[float, float],
    label_range: Sequence[float] | None,
) -> str:
    low, high = bounds
    outside = sum(not low <= value <= high for value in values)
    least, most = min(values), max(values)
    if least >= 0 and most <= 5:
        scale = "[0,5]"
    else:
        scale = "[-1,1]" if least >= -1 and most <= 1 else f"[{least:g},{most:g}]"
    cause = "`data.label_range` says" if label_range is not None else "the objective takes"
    return (
        f"Expected labels between {low:g} and {high:g}, as {cause}, but got {values[row]!r} in "
        f"{table.where(row)}, column {column!r} ({outside} of {len(values)} labels lie outside; "
        f"they run from {least:g} to {most:g}). If that is their scale, set "
        f"`data.label_range={scale}`; labels are never rescaled unasked."
    )


def _rescaler(
    given: tuple[float, float], expected: tuple[float, float]
) -> Callable[[list[float]], list[float]]:
    """Return the linear map from one range onto the other."""
    (low, high), (start, end) = given, expected
    if given == expected or not (math.isfinite(start) and math.isfinite(end)):
        return list
    return lambda values: [start + (v - low) / (high - low) * (end - start) for v in values]
