"""Checked access to JSON from outside: every error names the field and what was found there."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Collection
from typing import Any

from mara_runtime.errors import BundleError

MAX_DEPTH = 16
"""Of nesting; a manifest needs five."""


def load_object(text: str) -> Any:
    """Parse JSON strictly: no repeated keys, no NaN or Infinity, no excessive nesting. Raises ValueError."""
    try:
        root = json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError(str(error)) from None
    _check_depth(root)
    return root


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object without repeated keys, of which parsers take different ones."""
    value = dict(pairs)
    if len(value) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"{shortened(counts.most_common(1)[0][0])} is given twice")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _check_depth(root: Any) -> None:
    level = [root]
    for _ in range(MAX_DEPTH):
        level = [v for item in level if isinstance(item, (dict, list)) for v in _children(item)]
        if not level:
            return
    raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")


def _children(item: dict[str, Any] | list[Any]) -> list[Any]:
    return list(item.values()) if isinstance(item, dict) else item


def shortened(value: Any) -> str:
    """A value for an error message."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


class JsonReader:
    """Values by their path, as in "model.shape.num_layers"; a number in a path is an index. Raises BundleError."""

    def __init__(self, where: str, root: dict[str, Any], remedy: str = "export the bundle again") -> None:
        """where: the file, for messages; remedy: what mends it."""
        self._where, self._root, self._remedy = where, root, remedy

    def number(self, path: str) -> float:
        """A finite number of at least 0."""
        value: float = self.get(path, int, float)
        if not 0 <= value <= sys.float_info.max:
            raise self.wrong(path, f"is {shortened(value)}, not a finite number of at least 0")
        return float(value)

    def get(self, path: str, *kinds: type) -> Any:
        """A value of one of the `kinds`."""
        value: Any = self._root
        for key in path.split("."):
            if isinstance(value, list) and key.isdecimal():  # the caller knows its length
                value = value[int(key)]
            elif isinstance(value, dict) and key in value:
                value = value[key]
            else:
                raise self.wrong(path, "is missing")
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise self.wrong(path, f"is {shortened(value)}")
        return value

    def text(self, path: str, allowed: tuple[str, ...] | None = None) -> str:
        """A text, one of `allowed` if given."""
        value: str = self.get(path, str)
        if allowed is not None and value not in allowed:
            raise self.wrong(path, f"is {shortened(value)}, not one of {', '.join(allowed)}")
        return value

    def texts(self, path: str) -> list[str]:
        """A list of texts."""
        values: list[str] = self.get(path, list)
        if not all(isinstance(v, str) for v in values):
            raise self.wrong(path, f"is {shortened(values)}, not a list of texts")
        return values

    def count(self, path: str, least: int = 1) -> int:
        """A whole number of at least `least`."""
        value: int = self.get(path, int)
        if value < least:
            raise self.wrong(path, f"is {value}, not {'a positive number' if least else 'a number of at least 0'}")
        return value

    def counts(self, path: str, least: int = 1) -> tuple[int, ...]:
        """Whole numbers of at least `least`."""
        values: list[int] = self.get(path, list)
        if not all(isinstance(v, int) and not isinstance(v, bool) and v >= least for v in values):
            raise self.wrong(path, f"is {shortened(values)}, not a list of whole numbers")
        return tuple(values)

    def dict_of(self, kind: type, path: str) -> dict[str, Any]:
        """An object with values of one kind."""
        values: dict[str, Any] = self.get(path, dict)
        if not all(isinstance(v, kind) for v in values.values()):
            raise self.wrong(path, "has a value of another kind")
        return values

    def reject_unknown(self, path: str, names: Collection[str]) -> None:
        """Raise BundleError for a name that the object at `path` should not have."""
        for name in self.get(path, dict):
            if name not in names:
                raise self.wrong(f"{path}.{shortened(name)[1:-1]}", "is not known here")

    def wrong(self, path: str, what: str) -> BundleError:
        """The error for a field: `what` is wrong with it."""
        return BundleError(f"{self._where}: the field {path} {what}; {self._remedy}")
