"""Command-line flags from the fields of option dataclasses (`mara_runtime.options`)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from mara_runtime.errors import OptionError
from mara_runtime.options import NO_DEFAULT, Option, Options, options_of

T = TypeVar("T", bound=Options)
METAVARS: dict[type, str] = {int: "N", float: "X", str: "TEXT", Path: "PATH", dict: "NAME[=X]"}


def add_options(
    parser: argparse._ActionsContainer,
    config: type[Options],
    *,
    exclude: Sequence[str] = (),
    several: Sequence[str] = (),
    defaults: Sequence[Options] = (),
) -> None:
    """Add a flag for every field of a dataclass.

    several: single-valued fields whose flag may be repeated; `values_of` returns all of them.
    defaults: instances whose values the help shows as defaults, instead of those of the fields.
    """
    for each in options_of(config):
        if each.name not in exclude:
            shown = [getattr(instance, each.name) for instance in defaults]
            _add(parser, config, each, each.name in several, shown or [each.default])


def from_args(config: type[T], args: argparse.Namespace, **values: Any) -> T:
    """The dataclass, from the given flags; `values` take precedence. Raises OptionError."""
    return config(**{**given(config, args), **values})


def given(config: type[Options], args: argparse.Namespace) -> dict[str, Any]:
    """The fields whose flag was given, with the values."""
    values = {}
    for each in options_of(config):
        if hasattr(args, dest := _dest(config, each)):
            value = getattr(args, dest)
            values[each.name] = value if each.count is None else tuple(value)
            if each.kind is dict:
                values[each.name] = dict(value)
                if len(values[each.name]) < len(value):
                    raise OptionError(f"{each.flag} gives a name twice: {_shown([name for name, _ in value])}")
    return values


def values_of(config: type[Options], name: str, args: argparse.Namespace) -> tuple[Any, ...]:
    """All values of a flag in `several`, without duplicates; its default if it was not given."""
    each = next(each for each in options_of(config) if each.name == name)
    return tuple(dict.fromkeys(getattr(args, _dest(config, each), [each.default])))


def flags_given(config: type[Options], args: argparse.Namespace, exclude: Sequence[str] = ()) -> list[str]:
    """The flags that were given, but for those of the fields in `exclude`."""
    values = given(config, args)
    return [each.flag for each in options_of(config) if each.name in values and each.name not in exclude]


def reject(args: argparse.Namespace, config: type[Options], names: Sequence[str], reason: str) -> None:
    """Raise OptionError where one of the flags was given: `--name is VALUE, but REASON; leave it out`."""
    values = given(config, args)
    for each in options_of(config):
        if each.name in names and each.name in values:
            raise OptionError(f"{each.flag} is {_shown(values[each.name])}, but {reason}; leave it out")


def _dest(config: type[Options], each: Option) -> str:
    """Unique, as dataclasses may have fields of the same name."""
    return f"{config.__name__}.{each.name}"


def _add(
    parser: argparse._ActionsContainer, config: type[Options], each: Option, several: bool, shown: Sequence[Any]
) -> None:
    dest = _dest(config, each)
    if each.positional:
        details: dict[str, Any] = {} if each.default is NO_DEFAULT else {"nargs": "?", "default": argparse.SUPPRESS}
        if each.count == 0:
            details = {"nargs": "+"}
        parser.add_argument(dest, metavar=each.metavar, help=each.help, **details)
        return
    details = {"dest": dest, "default": argparse.SUPPRESS}
    if each.kind is bool:
        parser.add_argument(
            each.flag, action="store_false" if each.default is True else "store_true", help=_help(each, ()), **details
        )
        return
    details["type"] = lambda text: _converted(each.kind, text)
    details["metavar"] = each.metavar or (
        "{" + ",".join(map(str, each.choices)) + "}" if each.choices else METAVARS[each.kind]
    )
    if each.separator:
        details |= {
            "action": "extend",
            "type": lambda text: [_converted(each.kind, part) for part in text.split(each.separator)],
        }
    elif each.count:
        details |= {"nargs": each.count, "metavar": (details["metavar"],) * each.count}
    elif each.count == 0 or each.kind is dict or several:
        details["action"] = "append"
    parser.add_argument(each.flag, required=each.default is NO_DEFAULT, help=_help(each, shown, several), **details)


def _help(each: Option, defaults: Sequence[Any], several: bool = False) -> str:
    """The help text, with the default and whether the flag may be repeated."""
    notes = []
    if each.unset:
        notes.append(f"default: {each.unset}")
    elif shown := [_shown(value) for value in defaults if value not in (NO_DEFAULT, None, "", ())]:
        notes.append(f"default: {', '.join(dict.fromkeys(shown))}")
    if each.count == 0 or each.kind is dict or several:
        notes.append("can be repeated")
    return (each.help + (f" ({'; '.join(notes)})" if notes else "")).replace("%", "%%")


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{name}={number:g}" for name, number in value.items())
    return " ".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def _converted(kind: type, text: str) -> Any:
    """The value. Text that cannot be converted stays as it is: the dataclass rejects it, naming the range."""
    if kind is dict:
        name, sign, number = text.partition("=")
        return name, _converted(float, number) if sign else 1.0
    try:
        return kind(text) if text else text
    except ValueError:
        return text
