"""Options declared once, as dataclass fields: default, help, choices and range.

    @dataclass(frozen=True)
    class DecodeConfig(Options):
        top_k: int = option(40, "maximum number of candidates per position", least=1)

The field is the single source of the check (`--top-k is 0; it must be a whole number of at least 1`), of the JSON form,
and of the command-line flag with its help and default (`mara_deploy.commands.options`).
"""

from __future__ import annotations

import math
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from numbers import Integral, Real
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar

from mara_runtime.errors import OptionError

T = TypeVar("T")
_KEY = "option"
NO_DEFAULT: Any = object()
"""Default of an option that must be given."""


@dataclass(frozen=True)
class Option:
    """Everything known about one option. `option` and `required` set the first block, the field sets the second."""

    help: str
    flag: str = ""
    """e.g. --top-k"""
    metavar: str = ""
    choices: tuple[Any, ...] = ()
    least: float | None = None
    """smallest value allowed"""
    above: float | None = None
    """every value must exceed this"""
    most: float | None = None
    """largest value allowed"""
    unset: str = ""
    """what leaving the option out means, where the default value does not say it"""
    allow_empty: bool = False
    """text may be empty"""
    separator: str = ""
    """a flag takes several values, separated by this"""
    positional: bool = False

    name: str = ""
    kind: type = str
    """bool, int, float, str or Path; dict: numbers by name"""
    count: int | None = None
    """None: a single value; 0: a tuple of any length; else: a tuple of this length"""
    default: Any = NO_DEFAULT

    def allowed(self) -> str:
        """The range in words, e.g. "a whole number of at least 1"."""
        if self.choices:
            return "one of " + ", ".join(map(str, self.choices))
        if self.kind in (str, Path):
            return "text"
        if self.kind is dict:
            return "one or more names, each with a finite number"
        noun = "a whole number" if self.kind is int else "a number" if self.most is not None else "a finite number"
        low = "" if self.least is None else str(self.least)
        if self.above is not None:
            noun += f" above {self.above}"
        if self.most is None:
            return f"{noun} of at least {low}" if low else noun
        if self.above is not None:
            return f"{noun}, at most {self.most}"
        return f"{noun} from {low} to {self.most}" if low else f"{noun} of at most {self.most}"

    def check(self, value: Any) -> Any:
        """The value in plain Python types. Raises OptionError."""
        if self.default is not NO_DEFAULT and _same(value, self.default):
            return value
        if self.kind is bool:
            if not isinstance(value, bool):
                raise OptionError(f"{self.name} is {value!r}; it must be True or False")
            return value
        if self.count is None:
            return self._check_one(value)
        if not isinstance(value, tuple):
            raise OptionError(f"{self.flag} is {value!r}; it must be a tuple")
        if self.count and len(value) != self.count:
            raise OptionError(f"{self.flag} is {value!r}; it must have {self.count} values")
        return tuple(self._check_one(one) for one in value)

    def _check_one(self, value: Any) -> Any:
        if value == "" and not (self.allow_empty or self.choices):
            remedy = "leave it out for the default" if self.default is not NO_DEFAULT else "give a value"
            raise OptionError(f"{self.flag} is empty; {remedy}")
        plain = self._plain(value)
        if plain is None or (self.choices and plain not in self.choices) or not self._in_range(plain):
            raise OptionError(f"{self.flag} is {value!r}; it must be {self.allowed()}")
        return plain

    def _plain(self, value: Any) -> Any:
        """The value as this option's type; None if it is of another."""
        if self.kind is int:
            return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None
        if self.kind is float:
            return _finite(value)
        if self.kind is Path:
            return value if isinstance(value, Path) else None
        if self.kind is dict:
            return _numbers(value)
        return value if isinstance(value, str) else None

    def _in_range(self, value: Any) -> bool:
        return (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
        )


def option(default: T, help: str, **details: Any) -> T:
    """A dataclass field that is an option. details: of `Option`."""
    return field(default=default, metadata={_KEY: Option(help, **details)})


def required(help: str, **details: Any) -> Any:
    """`option` for a field without a default. details: of `Option`."""
    return field(metadata={_KEY: Option(help, **details)})


def options_of(config: type) -> tuple[Option, ...]:
    """The options of a dataclass, in the order of its fields."""
    if config not in _RESOLVED:
        hints = typing.get_type_hints(config)
        _RESOLVED[config] = tuple(_complete(f.metadata[_KEY], f.name, hints[f.name], f.default) for f in fields(config))
    return _RESOLVED[config]


_RESOLVED: dict[type, tuple[Option, ...]] = {}


class Options:
    """Base of dataclasses whose fields are all made by `option` or `required`."""

    def __post_init__(self) -> None:
        """Check every field and normalise numbers to plain int and float. Raises OptionError."""
        for each in options_of(type(self)):
            object.__setattr__(self, each.name, each.check(getattr(self, each.name)))

    def to_json(self) -> dict[str, Any]:
        """Plain values in the order of the fields."""
        values = {each.name: getattr(self, each.name) for each in options_of(type(self))}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_json(cls: type[T], values: Mapping[str, Any]) -> T:
        """The inverse of `to_json`. Raises OptionError."""
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def flag(name: str) -> str:
    """The flag of a field of that name."""
    return "--" + name.replace("_", "-")


def _complete(declared: Option, name: str, hint: Any, default: Any) -> Option:
    """What is declared, with name, type and default of the field."""
    kinds = [kind for kind in typing.get_args(hint) or (hint,) if kind is not NoneType]
    kinds = [dict if typing.get_origin(kind) is Mapping else kind for kind in kinds]
    count = None
    if typing.get_origin(hint) is tuple:
        count = 0 if kinds[-1] is Ellipsis else len(kinds)
    shown = declared.flag or flag(f"no_{name}" if default is True else name)
    if declared.positional:
        shown = declared.metavar
    return replace(
        declared,
        name=name,
        flag=shown,
        kind=kinds[0],
        count=count,
        default=NO_DEFAULT if default is MISSING else default,
    )


def _numbers(value: Any) -> dict[str, float] | None:
    """Finite numbers by name, at least one; None if they are anything else."""
    if not isinstance(value, Mapping) or not value:
        return None
    numbers = {name: _finite(number) for name, number in value.items() if isinstance(name, str)}
    finite = {name: number for name, number in numbers.items() if number is not None}
    return finite if len(finite) == len(value) else None


def _finite(value: Any) -> float | None:
    """The number, if it is one and finite."""
    try:
        number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _same(value: Any, default: Any) -> bool:
    return type(value) is type(default) and bool(value == default)
