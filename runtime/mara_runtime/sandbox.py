"""A Jinja sandbox with a budget: a chat template comes with a model, and may ask for any amount of time and memory.

Jinja's own sandbox keeps a template from the process and its files, but not from `range(99999)` inside `range(99999)`,
nor from `"%0999999999d" % 1`. Here everything that takes time is charged to the rendering: turns of loops, calls, the
size of what is joined, copied, compared and returned. What could be large is charged before it exists. A template that
overdraws the budget ends with an error; a conversation of a thousand messages takes a few percent of it.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from functools import wraps
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

BUDGET = 5_000_000
"""Steps of one rendering: a few seconds."""
MOST_CHARACTERS = 16_000_000
"""Of any one text."""
_CALL_STEPS = 10
_CHARACTERS_PER_STEP = 16
_SIZED_BY_ARGUMENT = {
    "center", "ljust", "rjust", "zfill", "expandtabs", "indent", "tojson", "batch", "slice", "to_bytes",
}  # fmt: skip
"""Methods and filters whose result has the size that a number says."""
_LARGEST_ARGUMENT = 10_000
"""Of those numbers."""
_SHALLOW_FILTERS = {"length", "count", "first", "last", "default", "d"}
_SHALLOW_TESTS = {
    "defined", "undefined", "none", "boolean", "true", "false", "number", "integer", "float", "string", "mapping",
    "sequence", "iterable", "callable", "sameas",
}  # fmt: skip
"""Those that do not read what their value contains."""
_MOST_BITS = 4096
"""Of integers that `*` and `**` make."""
_WIDE_FIELD = re.compile(r"\d{5}|%[^a-zA-Z%]*\*|\{[^{}]*\{")
"""In a format string: a field of great width, or one whose width is an argument."""


class Sandbox(ImmutableSandboxedEnvironment):
    """A sandboxed environment with a budget; call `begin` before each compilation and each rendering."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, filters: Mapping[str, Callable[..., Any]], **options: Any) -> None:
        """filters: in addition to Jinja's."""
        super().__init__(**options, finalize=self.weighed)
        self._spent = threading.local()
        self.concat = self.join  # type: ignore[method-assign] # of what a template, a macro or a block gives
        del self.globals["lipsum"], self.filters["wordwrap"]
        every: dict[str, Callable[..., Any]] = {**self.filters, **filters}
        self.filters = {name: self._charged(name, each, name in _SHALLOW_FILTERS) for name, each in every.items()}
        tests: Any = self.tests  # Jinja types them as bare functions
        self.tests = {name: self._charged(name, each, name in _SHALLOW_TESTS) for name, each in tests.items()}

    def begin(self) -> None:
        """The whole budget is there again, for this thread."""
        self._spent.steps = 0

    def charge(self, steps: int = _CALL_STEPS) -> None:
        """Take steps off the budget. Raises SecurityError when it is used up."""
        self._spent.steps += steps
        if self._spent.steps > BUDGET:
            raise SecurityError(f"it takes more than {BUDGET:,} steps")

    def weighed(self, value: Any) -> Any:
        """The value, charged for its size with all that it contains."""
        waiting = [value]
        while waiting:
            item = waiting.pop()
            if isinstance(item, str):
                self._charge_text(len(item))
            elif isinstance(item, Mapping):
                self.charge(1 + len(item))
                waiting += item.values()
            elif isinstance(item, (list, tuple, set, frozenset)):
                self.charge(1 + len(item))
                waiting += [each for each in item if isinstance(each, (str, Mapping, list, tuple, set, frozenset))]
            elif isinstance(item, Sized):
                self.charge(1 + len(item))
        return value

    def turns(self, items: Any) -> Any:
        """What a loop goes through or a slice is taken of, charged for its items but not for what these contain.

        Iterators are read first.
        """
        items = list(items) if isinstance(items, Iterator) else items
        if isinstance(items, str):
            self._charge_text(len(items))
        elif isinstance(items, Sized):
            self.charge(1 + len(items))
        return items

    def join(self, pieces: Iterable[Any]) -> str:
        """The texts of all pieces, one after another."""
        texts, length = [], 0
        for piece in pieces:
            texts.append(str(self.weighed(piece)))
            length += len(texts[-1])
            self._check_length(length)
        return "".join(texts)

    def _charge_text(self, characters: int) -> None:
        self._check_length(characters)
        self.charge(1 + characters // _CHARACTERS_PER_STEP)

    @staticmethod
    def _check_length(characters: int) -> None:
        if characters > MOST_CHARACTERS:
            raise SecurityError(f"it makes a text of more than {MOST_CHARACTERS:,} characters")

    # ── hooks of Jinja ───────────────────────────────────────────────────────────────────────────────────────────────

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Charges().visit(super()._parse(source, name, filename))
        return tree.set_environment(self)  # type: ignore[return-value]

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Whether a template may read the attribute."""
        return attr != "translate" and super().is_safe_attribute(obj, attr, value)

    def call(self, context: Context, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function or method."""
        method = getattr(function, "__wrapped__", function)  # the sandbox wraps str.format
        owner = getattr(method, "__self__", None)
        if owner is self:  # a charge that `_Charges` has put there
            return function(*args)
        if function is not self.globals["range"]:  # which has a limit of its own
            self.charge()
            args = tuple(self.weighed(self.turns(each)) for each in args)
            self._check(getattr(method, "__name__", "a function"), owner, args, kwargs)
        return self.weighed(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute `left operator right`."""
        self.charge()
        if operator == "%" and isinstance(left, str):
            self._check_format(left, self.weighed(right))
        elif isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * max(right, 0) if operator == "**" else left.bit_length() + right.bit_length()
            if bits > _MOST_BITS:
                raise SecurityError(f"it computes a number of more than {_MOST_BITS} bits")
        elif operator == "*" and isinstance(left, Sized) != isinstance(right, Sized):  # a text or list, so many times
            text, times = (left, right) if isinstance(left, Sized) else (right, left)
            self._charge_text(len(text) * max(int(times), 0))
        elif isinstance(left, str) and isinstance(right, str):
            self._charge_text(len(left) + len(right))
        return self.weighed(super().call_binop(context, operator, left, right))

    # ── charges ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _charged(self, name: str, function: Callable[..., Any], shallow: bool) -> Callable[..., Any]:
        """A filter or test, charged for what it reads and returns. shallow: nothing that its values contain."""
        first = 0 if getattr(function, "jinja_pass_arg", None) is None else 1  # the context or environment

        @wraps(function)
        def charged(*args: Any, **kwargs: Any) -> Any:
            self.charge()
            values = tuple(map(self.turns, args[first:]))
            if shallow:
                return function(*args[:first], *values, **kwargs)
            self._check(name, self.weighed(values[0]), self.weighed(values[1:]), kwargs)
            return self.weighed(function(*args[:first], *values, **kwargs))

        return charged

    def _check(self, name: str, owner: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Refuse a function, method or filter whose result would be too large. owner: the text or list it works on."""
        values = [*args, *kwargs.values()]
        large = any(isinstance(value, int) and abs(value) > _LARGEST_ARGUMENT for value in values)
        if large and name in _SIZED_BY_ARGUMENT:
            raise SecurityError(f"it calls {name} with a number beyond {_LARGEST_ARGUMENT:,}")
        longest = max((len(v) if isinstance(v, str) else v for v in values if isinstance(v, (str, int))), default=0)
        if name in ("format", "format_map"):
            self._check_format(str(owner), values)
        elif name == "replace" and isinstance(owner, str) and values:
            self._charge_text(len(owner) + owner.count(str(values[0])) * longest)
        elif name in ("indent", "expandtabs") and isinstance(owner, str):
            self._charge_text(len(owner) + (1 + owner.count("\n") + owner.count("\t")) * max(longest, 8))
        elif name == "tojson":
            self._charge_text(len(str(owner)) * (1 + longest))
        elif name == "join":
            separator, items = (owner, values[0]) if isinstance(owner, str) and values else ("", owner)
            size = max(len(separator), longest)
            self._charge_text(sum(size + len(str(item)) for item in items))
        elif name == "sum" and any(isinstance(value, Sized) and not isinstance(value, str) for value in values):
            raise SecurityError("it sums lists")

    def _check_format(self, text: str, values: Any) -> None:
        if _WIDE_FIELD.search(text):
            raise SecurityError("its format string has a field of great or variable width")
        self._charge_text(len(text) + (text.count("%") + text.count("{")) * len(str(values)))


class _Charges(NodeTransformer):
    """Puts the charges into a template: loops, literals, comparisons, slices, `~`."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = _call("turns", node.iter)
        node.body.insert(0, nodes.ExprStmt(_call("charge", lineno=node.lineno), lineno=node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:
        self.generic_visit(node)
        return _call("join", nodes.List(node.nodes, lineno=node.lineno))

    def visit_List(self, node: nodes.List) -> nodes.Call:
        self.generic_visit(node)
        return _call("weighed", node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Call:
        self.generic_visit(node)
        return _call("weighed", node)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:
        self.generic_visit(node)
        node.expr = _call("weighed", node.expr)
        for operand in node.ops:
            operand.expr = _call("weighed", operand.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Getitem:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _call("turns", node.node)
        return node


def _call(method: str, *args: Any, lineno: int = 1) -> nodes.Call:
    line = args[0].lineno if args else lineno
    return nodes.Call(nodes.EnvironmentAttribute(method, lineno=line), list(args), [], None, None, lineno=line)
