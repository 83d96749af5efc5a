"""Fields of a JSON object: one table says what each may be, to the check of a request and to the OpenAPI document."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mara_deploy.serve.errors import ApiError
from mara_runtime.errors import OptionError
from mara_runtime.options import Option

_JSON_NAMES = {str: "string", int: "integer", float: "number", bool: "boolean", list: "array", dict: "object"}


@dataclass(frozen=True)
class Spec:
    """What a field may be: one of `only`, in the range of `option`, of `kinds`, or anything. null is as if absent."""

    kinds: tuple[type, ...] = ()
    """types of JSON; (int, float): a number"""
    required: bool = False
    least: float | None = None
    most: float | None = None
    only: tuple[Any, ...] = ()
    """values, where others would change the answer in a way that is not there"""
    option: Option | None = None
    """in its range"""
    table: Mapping[str, Spec] | None = None
    """of the fields of an object"""
    needs: tuple[str, tuple[bool | None, ...]] | None = None
    """given only where another field has one of these values; None: it is absent"""
    more: Mapping[str, Any] = field(default_factory=dict)
    """what else a JSON schema says of it, which the request's own function checks"""

    @property
    def types(self) -> tuple[type, ...]:
        """Of JSON's types, those that it may have; none: any."""
        return self.kinds if self.option is None else (self.option.kind,)

    def schema(self) -> dict[str, Any]:
        """As a JSON schema."""
        found: dict[str, Any] = {}
        least, most, choices = self.least, self.most, self.only
        if self.option is not None:
            least, most, choices = self.option.least, self.option.most, self.option.choices
        if choices:
            found["enum"] = [*choices] if self.required else [*choices, None]
        elif self.types:
            names = [_JSON_NAMES[kind] for kind in self.types if kind is not int or float not in self.types]
            found["type"] = names if self.required else [*names, "null"]
        limits = {"minimum": least, "maximum": most}
        found |= {name: limit for name, limit in limits.items() if limit is not None}
        return {**found, **({} if self.table is None else object_schema(self.table)), **self.more}


Table = Mapping[str, Spec]


def object_schema(table: Table, others: Any = False) -> dict[str, Any]:
    """What a JSON schema says of an object's fields. others: of those that are not in the table."""
    found = {
        "properties": {name: spec.schema() for name, spec in table.items()},
        "required": [name for name, spec in table.items() if spec.required],
        "additionalProperties": others,
    }
    rules = []
    for needed in dict.fromkeys(spec.needs for spec in table.values() if spec.needs is not None):
        absent = {name: {"type": "null"} for name, spec in table.items() if spec.needs == needed}
        field, values = needed
        there = {"properties": {field: {"enum": [*values]}}, "required": [field] if None not in values else []}
        rules.append({"anyOf": [there, {"properties": absent}]})
    return {**found, "allOf": rules} if rules else found


class Fields:
    """A JSON object that agrees with a table. others: values that unknown fields may have; None: any.

    Raises ApiError, which names the field.
    """

    def __init__(
        self, values: Any, table: Table, within: str = "", *, others: tuple[Any, ...] | None = (None,)
    ) -> None:
        if not isinstance(values, dict):
            raise ApiError(400, "invalid_type", f"{within or 'the body'} must be a JSON object", param=within or None)
        self._prefix = f"{within}." if within else ""
        self._table = table
        self._values = {name: self._checked(name, spec, values.get(name)) for name, spec in table.items()}
        for name, spec in table.items():
            if spec.needs is not None and self[name] is not None and self[spec.needs[0]] not in spec.needs[1]:
                raise self.error(name, "invalid_value", f"is given, which needs {self.param(spec.needs[0])} to be true")
        for name, value in values.items():
            if name not in table and others is not None and value not in others:
                known = f"; known are {', '.join(sorted(table))}" if within else ""
                raise self.error(name, "unknown_parameter", f"is not a parameter that this server has{known}")

    def __getitem__(self, name: str) -> Any:
        """The value; None: it is absent."""
        return self._values[name]

    def param(self, name: str) -> str:
        """The field's name as errors give it."""
        return self._prefix + name

    def inner(self, name: str) -> Fields:
        """The fields of one that is an object with a table; all absent if it is."""
        return Fields(self[name] or {}, self._table[name].table or {}, self.param(name))

    def within(self, name: str, option: Option, value: Any) -> Any:
        """A value in the range of an option."""
        try:
            return replace(option, name=self.param(name), flag=self.param(name)).check(value)
        except OptionError as error:
            raise ApiError(400, "invalid_value", str(error), param=self.param(name)) from None

    def error(self, name: str, code: str, problem: str) -> ApiError:
        """A refusal that names the field."""
        return ApiError(400, code, f"{self.param(name)} {problem}", param=self.param(name))

    def _checked(self, name: str, spec: Spec, value: Any) -> Any:
        if value is None:
            if spec.required:
                raise self.error(name, "missing_required_parameter", "is missing")
            return None
        if spec.only:
            if not any(_equal(value, each) for each in spec.only):
                raise self.error(name, "unsupported_value", f"is {shown(value)}, which is not supported")
            return value
        kinds = spec.types
        if isinstance(value, float) and value.is_integer() and int in kinds and float not in kinds:
            value = int(value)  # 2.0 is an integer of JSON
        if spec.option is not None:
            return self.within(name, spec.option, value)
        if kinds and (not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)):
            names = [_JSON_NAMES[kind] for kind in kinds if kind is not int or float not in kinds]
            told = " or ".join(f"{'an' if each[0] in 'aio' else 'a'} {each}" for each in names)
            raise self.error(name, "invalid_type", f"is {shown(value)}; it must be {told}")
        if spec.least is not None and spec.most is not None and not spec.least <= value <= spec.most:
            allowed = f"from {spec.least:g} to {spec.most:g}"
            raise self.error(name, "invalid_value", f"is {shown(value)}; it must be {allowed}")
        return value


def shown(value: Any) -> str:
    """A value as errors give it."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _equal(value: Any, other: Any) -> bool:
    """Whether two JSON values are the same: true is not 1."""
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)
