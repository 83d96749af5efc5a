"""Size and structure of the product, in figures: `python tests/house.py [CHECKOUT]`.

Arrows are imports between files of a package, those inside functions and for type checking included; `from package
import module` is an arrow to the module.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "mara_runtime": "runtime/mara_runtime",
    "mara_export": "export/mara_export",
    "mara_deploy": "mara_deploy",
}
"""By name, each importing only those before it."""


@dataclass(frozen=True)
class House:
    """The product's modules in one checkout."""

    root: Path

    @cached_property
    def modules(self) -> dict[str, Path]:
        """Every file of the product by its module's name."""
        found = {}
        for package, folder in PACKAGES.items():
            for path in sorted((self.root / folder).rglob("*.py")):
                parts = path.relative_to(self.root / folder).with_suffix("").parts
                found[".".join((package, *parts)).removesuffix(".__init__")] = path
        return found

    @cached_property
    def lines(self) -> dict[str, int]:
        """Lines of each file of the product, by its path in the checkout."""
        return {self._name(path): _lines(path) for path in self.modules.values()}

    @cached_property
    def test_lines(self) -> int:
        """Lines of Python under tests/."""
        return sum(map(_lines, (self.root / "tests").rglob("*.py")))

    @cached_property
    def arrows(self) -> dict[str, set[str]]:
        """{module: the product's modules that it imports}."""
        return {module: {target for target, _ in self.imports(module)} & self.modules.keys() for module in self.modules}

    def imports(self, module: str) -> Iterator[tuple[str, int]]:
        """What a module imports anywhere in its file, and on which line. Of the product, files; of others, packages."""
        for node in ast.walk(tree(self.modules[module])):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                names = [name if name in self.modules else str(node.module) for name in names]
            else:
                continue
            for name in names:
                yield name if name in self.modules else name.partition(".")[0], node.lineno

    def between_files(self, package: str) -> int:
        """Arrows between the files of a package."""
        return sum(self._of(package, target) for module in self._in(package) for target in self.arrows[module])

    def circle(self) -> list[str]:
        """Modules that import each other in a circle, if there is one."""
        try:
            TopologicalSorter(self.arrows).prepare()
        except CycleError as error:
            return list(error.args[1])
        return []

    def repeated_classes(self) -> dict[str, list[str]]:
        """{name: files} of classes that are defined more than once."""
        found = defaultdict(list)
        for path in self.modules.values():
            for node in ast.walk(tree(path)):
                if isinstance(node, ast.ClassDef):
                    found[node.name].append(self._name(path))
        return {name: places for name, places in sorted(found.items()) if len(places) > 1}

    def report(self) -> str:
        """The figures, one a line."""
        sizes = Counter({package: sum(_lines(self.modules[m]) for m in self._in(package)) for package in PACKAGES})
        parts = ", ".join(f"{package} {lines:,}" for package, lines in sizes.items())
        longest = sorted(self.lines.items(), key=lambda item: -item[1])[:3]
        repeated = [f"{name} ({', '.join(places)})" for name, places in self.repeated_classes().items()]
        return "\n".join(
            [
                f"product          {sizes.total():6,} lines ({parts})",
                f"tests            {self.test_lines:6,} lines",
                f"files            {len(self.modules):6,}; longest: {', '.join(f'{p} {n}' for p, n in longest)}",
                *(f"{p:<16} {self.between_files(p):6,} imports between {len(self._in(p))} files" for p in PACKAGES),
                f"circle of imports     {' -> '.join(self.circle()) or 'none'}",
                f"repeated classes      {', '.join(repeated) or 'none'}",
            ]
        )

    def _in(self, package: str) -> list[str]:
        return [module for module in self.modules if self._of(package, module)]

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    @staticmethod
    def _of(package: str, module: str) -> bool:
        return module.partition(".")[0] == package


@cache
def tree(path: Path) -> ast.Module:
    """A file, parsed once."""
    return ast.parse(path.read_text(encoding="utf-8"))


def _lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


if __name__ == "__main__":
    print(House(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT).report())
