"""Recipes: YAML files read into frozen dataclasses. Unknown keys and wrong types are errors with their path."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from persimmon.errors import ConfigError, NotFoundError

T = TypeVar("T")

# YAML 1.1 reads 8e-3 and 1e9 as text, for want of a dot or a sign; people mean numbers.
_EXPONENT = re.compile(r"[-+]?\d[\d_]*(\.\d*)?[eE][-+]?\d+")


def load_recipe(kind: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """Read `path` as a `kind`, with `key.sub=value` overrides (values in YAML) applied on top."""
    path = Path(path)
    if not path.is_file():
        raise NotFoundError(f"no recipe at {path}")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML ({error})") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a recipe is a mapping")
    for override in overrides:
        _apply_override(data, override)
    return from_mapping(kind, data, path.name)


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set needs key=value, got {override!r}")
    *parents, last = key.split(".")
    for parent in parents:
        data = data.setdefault(parent, {})
        if not isinstance(data, dict):
            raise ConfigError(f"--set {key}: {parent} is not a section")
    try:
        data[last] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"--set {key}: {value!r} is not YAML") from None


def from_mapping(kind: type[T], data: Any, where: str) -> T:
    """Build the dataclass `kind` from a mapping; errors read `where: section.key: what is wrong`."""
    return _build(kind, data, where, "")


def _build(kind: type[T], data: Any, where: str, path: str) -> T:
    place = f"{where}: {path}" if path else where
    if not isinstance(data, Mapping):
        raise ConfigError(f"{place}: expected a mapping, got {data!r}")
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(data) - set(fields), key=str)
    if unknown:
        raise ConfigError(f"{place}: unknown key {unknown[0]!r}; known: {', '.join(fields)}")
    missing = [name for name, field in fields.items() if name not in data and _is_required(field)]
    if missing:
        raise ConfigError(f"{place}: {missing[0]!r} is missing")
    values = {
        name: _convert(hints[name], value, where, f"{path}.{name}" if path else name) for name, value in data.items()
    }
    try:
        return kind(**values)
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from None


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _convert(hint: Any, value: Any, where: str, path: str) -> Any:
    """`value` as the type `hint`: a dataclass, tuple[X, ...], dict[str, X], X | None, Any or a plain type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        (hint,) = (a for a in arguments if a is not type(None))
        return _convert(hint, value, where, path)
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, where, path)
    if origin is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"{where}: {path}: expected a list, got {value!r}")
        return tuple(_convert(arguments[0], item, where, f"{path}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: {path}: expected a mapping, got {value!r}")
        return {str(key): _convert(arguments[1], item, where, f"{path}.{key}") for key, item in value.items()}
    return value if hint is Any else _plain(hint, value, f"{where}: {path}")


def _plain(kind: type, value: Any, place: str) -> Any:
    """A string, flag or number; whole numbers pass as float, whole floats (1e9) as int."""
    if isinstance(value, str) and kind in (int, float) and _EXPONENT.fullmatch(value):
        value = float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ConfigError(f"{place}: expected {kind.__name__}, got {value!r}")
    return value
