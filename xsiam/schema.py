"""Configuration files and overrides, read by the declared types of a dataclass schema.

Nothing here knows what is configured: `xsiam.config` holds the schema. A value is first read by the
type that its field declares and only then merged, so that ``model.name=no`` is the text "no" and
``attribution.layers=4`` the list [4].
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from xsiam.errors import InputError

_NULL = ("null", "none")
_TRUE = ("true", "yes", "on", "1")
_FALSE = ("false", "no", "off", "0")
# How alike a key and a misspelled one are, section included, so that no other key is meant.
_ALL_BUT_EQUAL = 0.9
_NAMES: dict[Any, str] = {
    str: "text",
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    type(None): "null",
}


@dataclass(frozen=True)
class Constraint:
    """What a value must meet beyond its type, for use in ``Annotated``.

    Attributes:
        expected: The end of "Expected `key` to be …".
        holds: Whether a value of the right type meets it.
    """

    expected: str
    holds: Callable[[Any], bool]


class Section:
    """Base of the dataclasses of a schema, which are its sections and its root."""

    def check(self, prefix: str) -> None:
        """Raise InputError where fields, each right in itself, do not fit together.

        Args:
            prefix: What stands before the field names in keys, such as "attribution.".
        """


SchemaT = TypeVar("SchemaT", bound=Section)


def leaves(schema: type[Section], prefix: str = "") -> dict[str, Any]:
    """Return the declared type of every value by its dotted key, in the order of declaration."""
    found: dict[str, Any] = {}
    for name, hint in _hints(schema).items():
        if _is_section(hint):
            found.update(leaves(hint, f"{prefix}{name}."))
        else:
            found[prefix + name] = hint
    return found


def flatten_file(schema: type[Section], content: Any, origin: str) -> dict[str, Any]:
    """Return the checked values of a parsed YAML file by dotted key.

    Raises:
        InputError: If a key is unknown, a section is no section, or a value has the wrong type.
    """
    if not isinstance(content, Mapping):
        raise InputError(
            f"Expected {origin} to hold `key: value` lines, but got a {type(content).__name__}."
        )
    hints, values = leaves(schema), {}
    for key, value in _walk(content, _sections(hints), "", origin):
        if key not in hints:
            raise InputError(_unknown(key, hints, origin))
        values[key] = check_value(key, value, hints[key], origin)
    return values


def read_override(schema: type[Section], override: str) -> tuple[str, Any]:
    """Return key and value of ``key=value``, the value read by the type the key declares.

    Raises:
        InputError: If it has another form, the key is unknown, or the value has the wrong type.
    """
    key, equals, text = override.partition("=")
    key, hints = key.strip(), leaves(schema)
    if not equals or not key:
        raise InputError(
            f"Expected an override of the form `key=value`, but got {override!r}. "
            "Write for example `trainer.max_epochs=3`."
        )
    if key in _sections(hints):
        inside = ", ".join(f"`{name}`" for name in hints if name.startswith(f"{key}."))
        raise InputError(
            f"Expected the key of a value, but `{key}` in {override!r} is a section. "
            f"Set one of {inside}."
        )
    if key not in hints:
        raise InputError(_unknown(key, hints, "the command line"))
    value = _from_text(text, hints[key])
    return key, check_value(key, value, hints[key], "the command line")


def check_value(key: str, value: Any, hint: Any, origin: str | None = None) -> Any:
    """Return ``value`` as the type ``hint`` declares (a whole number may become a float).

    Raises:
        InputError: If it is of another type or does not meet the type's constraints.
    """
    typed = _as_type(value, hint)
    if isinstance(typed, _Mismatch):
        place = f" in {origin}" if origin else ""
        raise InputError(
            f"Expected `{key}` to be {typed.expected}, but got {value!r}. Set `{key}`{place}"
            f"{_quoting(value, hint)}."
        )
    if isinstance(typed, str) and "${" in typed:
        raise InputError(
            f"Expected `{key}` to be text without '${{', but got {value!r}: values do not refer to "
            f"each other. Set `{key}`."
        )
    return typed


def build(schema: type[SchemaT], values: Mapping[str, Any]) -> SchemaT:
    """Return the schema's dataclass with ``values`` by dotted key in place of its defaults."""
    config: SchemaT = _build(schema, values, "", None)
    return config


def validate(config: Section) -> None:
    """Check every value of a configuration, and how they fit together.

    Raises:
        InputError: At the first value that does not meet its type or constraint.
    """
    for key, hint in leaves(type(config)).items():
        value: Any = config
        for name in key.split("."):
            value = getattr(value, name)
        check_value(key, value, hint)
    _check_sections(config, "")


def read_yaml(path: str | Path) -> Any:
    """Return the content of a YAML file as plain dicts, lists and values.

    Raises:
        InputError: If there is no such file or it is not YAML (duplicate keys included).
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    file = Path(path).expanduser()
    if not file.is_file():
        raise InputError(_no_file(path, file))
    try:
        # OmegaConf's loader refuses duplicate keys and reads 2e-5 as a number; PyYAML's does not.
        return OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"Expected {str(path)!r} to be a YAML file of `key: value` lines, but got: {reason}."
        ) from error


def write_yaml(content: Mapping[str, Any], path: str | Path) -> None:
    """Write plain dicts, lists and values as YAML, making the folder where it is missing."""
    from omegaconf import OmegaConf

    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(OmegaConf.to_yaml(OmegaConf.create(dict(content))), encoding="utf-8")


@dataclass(frozen=True)
class _Mismatch:
    """A value that is not what its type declares, and what was expected."""

    expected: str


def _hints(schema: type[Section]) -> dict[str, Any]:
    return get_type_hints(schema, include_extras=True)


def _is_section(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Section)


def _sections(keys: Mapping[str, Any]) -> set[str]:
    """Return the dotted names of all sections that hold ``keys``."""
    parts = [key.split(".") for key in keys]
    return {".".join(part[:depth]) for part in parts for depth in range(1, len(part))}


def _walk(
    content: Mapping[Any, Any], sections: set[str], prefix: str, origin: str
) -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and values of nested mappings, going down only where sections are."""
    for name, value in content.items():
        key = f"{prefix}{name}"
        if key not in sections:
            yield key, value
        elif isinstance(value, Mapping):
            yield from _walk(value, sections, f"{key}.", origin)
        else:
            raise InputError(
                f"Expected `{key}` to be a section with keys below it, but got {value!r}. "
                f"Set the keys of `{key}` in {origin}."
            )


def _unknown(key: str, known: Mapping[str, Any], origin: str) -> str:
    """Return the message for an unknown key, with the known keys it resembles."""
    same_name = [name for name in known if name.split(".")[-1] == key.split(".")[-1]]
    close = difflib.get_close_matches(key, known, n=1, cutoff=_ALL_BUT_EQUAL)
    close = close or same_name or difflib.get_close_matches(key, known, n=1)
    if not close:
        by_name = {name.split(".")[-1]: name for name in known}
        last = difflib.get_close_matches(key.split(".")[-1], by_name, n=1)
        close = [by_name[name] for name in last]
    if close:
        hint = f"Did you mean {' or '.join(f'`{name}`' for name in close)}?"
    else:
        near = [name for name in known if name.startswith(f"{key.split('.')[0]}.")]
        hint = f"Known keys are {', '.join(f'`{name}`' for name in near or known)}."
    return f"Expected a known key, but got `{key}` in {origin}. {hint}"


def _members(hint: Any) -> tuple[Any, ...]:
    """Return the alternatives of a union, or the type itself."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _bare(hint: Any) -> tuple[Any, tuple[Constraint, ...]]:
    """Return a type without its annotations, and the constraints among them."""
    if get_origin(hint) is not Annotated:
        return hint, ()
    base, *extras = get_args(hint)
    return base, tuple(extra for extra in extras if isinstance(extra, Constraint))


def _from_text(text: str, hint: Any) -> Any:
    """Return what ``text`` means for the declared type; the text itself where it means nothing."""
    bases = [_bare(member)[0] for member in _members(hint)]
    word = text.strip()
    # "none" is a text where texts are allowed (`data.column_label=none`); Python's None is not.
    is_null = word in ("null", "None") if str in bases else word.lower() in _NULL
    if type(None) in bases and is_null:
        return None
    if bool in bases and word.lower() in _TRUE + _FALSE:
        return word.lower() in _TRUE
    for number in (int, float):
        if number in bases:
            try:
                return number(word)
            except ValueError:
                continue
    for base in bases:
        if get_origin(base) is list:
            inside = word.removeprefix("[").removesuffix("]").strip()
            (element,) = get_args(base)
            parts = [part.strip() for part in inside.split(",")] if inside else []
            return [_from_text(part, element) for part in parts]
        if get_origin(base) is Literal:
            return word
    return text


def _as_type(value: Any, hint: Any) -> Any:
    """Return ``value`` as the first alternative of ``hint`` that fits it, else a mismatch."""
    problems: list[str] = []
    for member in _members(hint):
        base, constraints = _bare(member)
        typed = _as_base(value, base)
        if isinstance(typed, _Mismatch):
            continue
        broken = [rule.expected for rule in constraints if not rule.holds(typed)]
        if not broken:
            return typed
        problems += broken
    return _Mismatch(problems[0] if problems else _describe(hint))


def _as_base(value: Any, base: Any) -> Any:
    """Return ``value`` as ``base``, a type without alternatives, or a mismatch."""
    if get_origin(base) is Literal:
        return value if value in get_args(base) else _Mismatch("")
    if get_origin(base) is list:
        if not isinstance(value, list):
            return _Mismatch("")
        items = [_as_type(item, get_args(base)[0]) for item in value]
        bad = [item for item in items if isinstance(item, _Mismatch)]
        return bad[0] if bad else items
    if base is float and type(value) in (int, float):
        return float(value) if math.isfinite(value) else _Mismatch("")
    return value if type(value) is base else _Mismatch("")


def _describe(hint: Any) -> str:
    """Return in words what values a declared type takes."""
    names: list[str] = []
    for member in _members(hint):
        base, constraints = _bare(member)
        if constraints:
            names.append(constraints[0].expected)
        elif get_origin(base) is Literal:
            names += [repr(option) for option in get_args(base)]
        elif get_origin(base) is list:
            names.append(f"a list, each of it {_describe(get_args(base)[0])}")
        else:
            names.append(_NAMES[base])
    return " or ".join(names)


def _quoting(value: Any, hint: Any) -> str:
    """Return the advice to quote, where YAML has read a text as something else."""
    takes_text = any(_bare(member)[0] is str for member in _members(hint))
    if not takes_text or not isinstance(value, bool | int | float):
        return ""
    return (
        ", between quotes: without them YAML reads yes, no, on, off, true and false as booleans "
        "and digits as a number"
    )


def _build(schema: Any, values: Mapping[str, Any], prefix: str, default: Any) -> Any:
    """Return an instance of ``schema`` from ``values``, then ``default``, then its defaults."""
    arguments: dict[str, Any] = {}
    hints = _hints(schema)
    for field in dataclasses.fields(schema):
        key = prefix + field.name
        if _is_section(hints[field.name]):
            given = _default(field, default, key)
            arguments[field.name] = _build(type(given), values, f"{key}.", given)
        else:
            is_given = key in values
            arguments[field.name] = values[key] if is_given else _default(field, default, key)
    return schema(**arguments)


def _default(field: dataclasses.Field[Any], instance: Any, key: str) -> Any:
    """Return what a field is where nothing sets it."""
    if instance is not None:
        return getattr(instance, field.name)
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    if field.default is not dataclasses.MISSING:
        return field.default
    raise InputError(f"Expected `{key}`, but none is given. Set `{key}=…` on the command line.")


def _check_sections(config: Section, prefix: str) -> None:
    config.check(prefix)
    for name in _hints(type(config)):
        value = getattr(config, name)
        if isinstance(value, Section):
            _check_sections(value, f"{prefix}{name}.")


def _no_file(path: str | Path, file: Path) -> str:
    """Return the message for a configuration file that is not there."""
    folder = file.parent if file.parent.is_dir() else Path()
    near = difflib.get_close_matches(file.name, [entry.name for entry in folder.glob("*.yaml")], 1)
    hint = f" Did you mean {str(file.with_name(near[0]))!r}?" if near else ""
    return (
        f"Expected a YAML configuration file, but {str(path)!r} does not exist (looked for "
        f"{str(file.absolute())!r}).{hint}"
    )
