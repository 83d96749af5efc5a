"""Checked access to JSON from outside: every error names the field and what was found there."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from typing import Any

from mara_runtime.errors import BundleError

MAX_DEPTH = 16
"""Of nesting; a manifest needs five."""
MOST = 2**31 - 1
"""The largest whole number: sizes beyond would overflow in an engine."""
MOST_LETTERS = 500
"""Of a text that people see."""
_UNSHOWABLE = re.compile("[\x00-\x1f\x7f-\x9f]")
"""Control characters, which would reach the terminal."""
_SURROGATE = re.compile("[\ud800-\udfff]")


def load_object(text: str) -> Any:
    """Parse JSON strictly: no repeated keys, NaN, Infinity, half characters or excessive nesting. Raises ValueError."""
    try:
        root = json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError(str(error)) from None
    _check_depth(root)
    if "\\u" in text and _SURROGATE.search(json.dumps(root, ensure_ascii=False)):
        raise ValueError("it has half of a surrogate pair")
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
        self._asked: set[tuple[str, ...]] = set()
        """paths of the values that were asked for, and of what contains them"""

    def reject_unknown(self) -> None:
        """Raise BundleError for a field that was not asked for; what was asked for as a whole may have any."""
        whole = self._asked - {path[:-1] for path in self._asked}

        def check(value: Any, path: tuple[str, ...]) -> None:
            if path in whole or not isinstance(value, (dict, list)):
                return
            for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
                here = (*path, str(key))
                if here not in self._asked:
                    raise self.wrong(shortened(".".join(here))[1:-1], "is not known to this release")
                check(inner, here)

        check(self._root, ())

    def number(self, path: str) -> float:
        """A finite number of at least 0."""
        value: float = self.get(path, int, float)
        if not 0 <= value <= sys.float_info.max:
            raise self.wrong(path, f"is {shortened(value)}, not a finite number of at least 0")
        return float(value)

    def get(self, path: str, *kinds: type) -> Any:
        """A value of one of the `kinds`."""
        value: Any = self._root
        keys = tuple(path.split("."))
        self._asked.update(keys[:i] for i in range(len(keys) + 1))
        for key in keys:
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
        """A short text without control characters, one of `allowed` if given."""
        value: str = self.get(path, str)
        if len(value) > MOST_LETTERS or _UNSHOWABLE.search(value):
            raise self.wrong(path, f"is {shortened(value)}, which is too long or has control characters")
        if allowed is not None and value not in allowed:
            raise self.wrong(path, f"is {shortened(value)}, not one of {', '.join(allowed)}")
        return value

    def texts(self, path: str) -> list[str]:
        """A list of texts without control characters."""
        values: list[str] = self.get(path, list)
        if not all(isinstance(v, str) and not _UNSHOWABLE.search(v) for v in values):
            raise self.wrong(path, f"is {shortened(values)}, not a list of texts")
        return values

    def count(self, path: str, least: int = 1) -> int:
        """A whole number of at least `least`, at most MOST."""
        value: int = self.get(path, int)
        if not least <= value <= MOST:
            raise self.wrong(path, f"is {shortened(value)}, not a whole number from {least} to {MOST}")
        return value

    def counts(self, path: str, least: int = 1) -> tuple[int, ...]:
        """Whole numbers of at least `least`, at most MOST."""
        values: list[int] = self.get(path, list)
        if not all(isinstance(v, int) and not isinstance(v, bool) and least <= v <= MOST for v in values):
            raise self.wrong(path, f"is {shortened(values)}, not a list of whole numbers")
        return tuple(values)

    def dict_of(self, kind: type, path: str, *, shown: bool = False) -> dict[str, Any]:
        """An object with values of one kind. shown: it has no control characters."""
        values: dict[str, Any] = self.get(path, dict)
        if not all(isinstance(v, kind) for v in values.values()):
            raise self.wrong(path, "has a value of another kind")
        if shown and any(_UNSHOWABLE.search(text) for item in values.items() for text in item):
            raise self.wrong(path, "has control characters")
        return values

    def wrong(self, path: str, what: str) -> BundleError:
        """The error for a field: `what` is wrong with it."""
        return BundleError(f"{self._where}: the field {path} {what}; {self._remedy}")
