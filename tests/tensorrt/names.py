"""Names of TensorRT and CUDA: those that our code uses, read from its source, and those that NVIDIA's wheels have."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

MODULE = (("trt",), ("self", "_trt"), ("self", "trt"))
"""What the TensorRT module is called in our code."""


@dataclass(frozen=True)
class Use:
    """A name that our code uses."""

    name: str
    """dotted, from the module on: IExecutionContext.set_input_shape"""
    where: str
    """file and line"""
    positional: int | None = None
    """how many arguments are handed over; None: it is not called, or with a starred argument"""
    keywords: frozenset[str] = frozenset()
    optional: bool = False
    """the code asks whether the name is there"""


Signatures = list[list[tuple[str, bool]]]
"""of each overload: its parameters without self, and whether they may be left out"""


# ── what our code uses ───────────────────────────────────────────────────────────────────────────────────────────────


def tensorrt_uses(path: Path, receivers: Mapping[str, str]) -> list[Use]:
    """receivers: last name of what a method is called on → the class that it is an object of."""
    return _Reader(path, receivers).tensorrt()


def cuda_uses(path: Path) -> list[Use]:
    """Names of cuda.bindings.runtime; all of them begin with cuda, and calls may go through a helper by name."""
    return _Reader(path, {}).cuda()


class _Reader:
    def __init__(self, path: Path, receivers: Mapping[str, str]) -> None:
        self._path, self._receivers = path, receivers
        self._tree = ast.parse(path.read_text(encoding="utf-8"))
        self._aliases: dict[str, ast.expr] = {}
        for node in ast.walk(self._tree):
            if isinstance(node, ast.Assign) and len(node.targets) == 1:
                target, value = node.targets[0], node.value
                pairs = [(target, value)]
                if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                    pairs = list(zip(target.elts, value.elts, strict=True))
                self._aliases.update({t.id: v for t, v in pairs if isinstance(t, ast.Name)})
        self._inner = {id(n.value) for n in ast.walk(self._tree) if isinstance(n, ast.Attribute)}
        self._calls = {id(n.func): n for n in ast.walk(self._tree) if isinstance(n, ast.Call)}

    def tensorrt(self) -> list[Use]:
        found = []
        for node in ast.walk(self._tree):
            if isinstance(node, ast.Attribute) and id(node) not in self._inner:
                found += self._use(node, self._tensorrt_names(_chain(node)))
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) >= 2:
                name = node.args[1]
                if node.func.id in ("getattr", "hasattr") and isinstance(name, ast.Constant):
                    asks = node.func.id == "hasattr" or len(node.args) == 3
                    dotted = self._tensorrt_names([*_chain(node.args[0]), str(name.value)])
                    found += [Use(name, self._where(node), optional=asks) for name in dotted]
        asked = {use.name for use in found if use.optional}
        return [Use(u.name, u.where, u.positional, u.keywords, u.name in asked) for u in found]

    def _tensorrt_names(self, chain: Sequence[str]) -> list[str]:
        """What is looked up in a chain like self, _engine, num_io_tensors: of the module, or of known objects."""
        if chain and chain[0] in self._aliases and (alias := self._of_module(_chain(self._aliases[chain[0]]))):
            return [".".join([alias, *chain[1:]])] if chain[1:] else []
        if (name := self._of_module(chain)) is not None:
            return [name]
        known = [(self._receivers.get(part), of) for part, of in pairwise(chain)]
        return [f"{receiver}.{name}" for receiver, name in known if receiver is not None]

    def _of_module(self, chain: Sequence[str]) -> str | None:
        for prefix in MODULE:
            if tuple(chain[: len(prefix)]) == prefix and len(chain) > len(prefix):
                return ".".join(chain[len(prefix) :])
        return None

    def cuda(self) -> list[Use]:
        found = []
        for node in ast.walk(self._tree):
            if isinstance(node, ast.Attribute) and id(node) not in self._inner:
                chain = _chain(node)
                if chain and chain[0] in self._aliases:
                    chain = [*_chain(self._aliases[chain[0]]), *chain[1:]]
                name = ".".join(part for part in chain if re.match("cuda[A-Z]", part))
                found += self._use(node, [name] if name else [])
            elif isinstance(node, ast.Call):
                for at, argument in enumerate(node.args):
                    if isinstance(argument, ast.Constant) and re.match("cuda[A-Z]", str(argument.value)):
                        handed = node.args[at + 1 :]
                        starred = any(isinstance(a, ast.Starred) for a in handed)
                        found.append(Use(str(argument.value), self._where(node), None if starred else len(handed)))
        return found

    def _use(self, node: ast.Attribute, found: Sequence[str]) -> list[Use]:
        """The uses in one chain; if it is called, then the last."""
        where = self._where(node)
        if not found or node.attr == "__class__":
            return []
        call = self._calls.get(id(node))
        if call is None or any(isinstance(a, ast.Starred) for a in call.args):
            return [Use(name, where) for name in found]
        keywords = frozenset(keyword.arg for keyword in call.keywords if keyword.arg)
        unbound = node.attr == "__init__"  # called on the class: the first argument is self
        return [*(Use(name, where) for name in found[:-1]), Use(found[-1], where, len(call.args) - unbound, keywords)]

    def _where(self, node: ast.expr) -> str:
        return f"{self._path.name}:{node.lineno}"

    def attributes(self) -> Iterator[tuple[list[str], str]]:
        """Every attribute that is looked up, with what it is looked up on, and where."""
        for node in ast.walk(self._tree):
            if isinstance(node, ast.Attribute):
                yield _chain(node), self._where(node)

    def overrides(self) -> Iterator[tuple[str, str, list[str], str]]:
        """(class of TensorRT, method, its parameters without self, where) of the classes that our code derives."""
        for node in ast.walk(self._tree):
            for base in node.bases if isinstance(node, ast.ClassDef) else ():
                if (of := self._of_module(_chain(base))) is not None:
                    for method in node.body:
                        if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                            parameters = [a.arg for a in method.args.args[1:]]
                            yield of, method.name, parameters, f"{self._path.name}:{method.lineno}"


def attributes(path: Path) -> list[tuple[list[str], str]]:
    """Every attribute that is looked up in a file, with what it is looked up on, and where."""
    return list(_Reader(path, {}).attributes())


def overrides(path: Path) -> list[tuple[str, str, list[str], str]]:
    """(class of TensorRT, method, its parameters without self, where) of the classes that a file derives."""
    return list(_Reader(path, {}).overrides())


def _chain(node: ast.expr) -> list[str]:
    """["self", "_trt", "DataType"]; what is no name in it is left out."""
    if isinstance(node, ast.Attribute):
        return [*_chain(node.value), node.attr]
    return [node.id] if isinstance(node, ast.Name) else []


# ── what NVIDIA's wheels have ────────────────────────────────────────────────────────────────────────────────────────

_LIST = """
import importlib, json, sys
module = importlib.import_module(sys.argv[1])
found = {}
def visit(value, path):
    for name in dir(value):
        if name.startswith("_") and name not in ("__init__", "__version__", "__name__", "__members__"):
            continue
        item = getattr(value, name)
        found[".".join([*path, name])] = (item.__doc__ or "") if callable(item) else ""
        if isinstance(item, type) and len(path) < 3 and name != "__class__":
            visit(item, [*path, name])
visit(module, [])
print(json.dumps({"version": getattr(module, "__version__", ""), "names": found}))
"""


@dataclass(frozen=True)
class Released:
    """The names of one release, with the documentation of what can be called."""

    version: str
    names: dict[str, str]

    def signatures(self, name: str) -> Signatures:
        """Of a function, or of a class: how it is made."""
        names = [name, f"{name}.__init__"]
        return next((found for n in names if (found := signatures(n.split(".")[-1], self.names.get(n, "")))), [])


def released(module: str, folders: Sequence[Path], libraries: Path | None = None) -> Released:
    """Import a module in a process of its own and list it. folders: come before everything else on the path."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))}
    if libraries is not None:
        environment["LD_LIBRARY_PATH"] = str(libraries)
    command = [sys.executable, "-c", _LIST, module]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert out.returncode == 0, f"{module} of {', '.join(map(str, folders)) or 'the environment'}: {out.stderr}"
    return Released(**json.loads(out.stdout))


def signatures(name: str, documentation: str) -> Signatures:
    """The overloads that a docstring of pybind11 or Cython begins with."""
    found = []
    for match in re.finditer(rf"^(?:\d+\. )?{re.escape(name)}\((.*)\)(?: -> .*)?$", documentation, re.MULTILINE):
        parameters = [_parameter(text) for text in _split(match[1])]
        if [p for p, _ in parameters] != ["*args", "**kwargs"]:
            found.append([p for p in parameters if p[0] != "self"])
    return found


def _parameter(text: str) -> tuple[str, bool]:
    """`name: type = default`, or `type name`."""
    name, _, default = text.partition("=")
    return name.partition(":")[0].split()[-1], bool(default)


def _split(text: str) -> list[str]:
    """At commas outside all brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[(<{") - (character in "])>}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part for part in parts if part.strip()]


def fits(use: Use, overloads: Signatures) -> bool:
    """May the name be called as it is?"""
    return any(_fits(use, parameters) for parameters in overloads)


def _fits(use: Use, parameters: Sequence[tuple[str, bool]]) -> bool:
    if use.positional is None:
        return True
    rest = dict(parameters[use.positional :])
    needed = {name for name, may_be_left_out in rest.items() if not may_be_left_out}
    return use.positional <= len(parameters) and use.keywords <= set(rest) and needed <= use.keywords
