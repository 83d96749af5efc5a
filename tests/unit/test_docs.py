"""The documents: links resolve, generated pages are current, and tables agree with the code.

tests/export/test_documents.py runs their commands and examples.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import fields
from pathlib import Path

import pytest

from mara_export import targets
from mara_runtime import manifest as m
from tests.house import ROOT, House

MODULES = House(ROOT).modules.values()
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), ROOT / "benchmarks" / "README.md"])
README_LINES = 130
OTHERS_FLAGS = {"--system-site-packages", "--runtime", "--gpus", "--bundles", "--smoke", "--dry-run", "--widths"}
"""Of python, docker and benchmarks/."""
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def generator(name: str):
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub forms them."""
    headings = re.findall(r"^#+ (.*)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_page
def test_links_resolve(page):
    for target, _, anchor in (link.partition("#") for link in re.findall(r"\]\(([^)]+)\)", text_of(page))):
        if target.startswith(("http://", "https://")):
            continue
        linked = (page.parent / target).resolve() if target else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), f"{target}#{anchor}"


def test_the_readme_is_short():
    assert len(text_of(ROOT / "README.md").splitlines()) <= README_LINES


@pytest.mark.parametrize("name", ["make_commands", "make_memory"])
def test_generated_pages_are_current(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")
    module = generator(name)
    assert text_of(module.PAGE) == module.page(), "run `make docs`"


@every_page
def test_options_exist(page):
    """Every option in running text is one of a command."""
    known = set(re.findall(r"--[a-z][a-z-]*", text_of(DOCS / "reference" / "commands.md"))) | OTHERS_FLAGS
    running_text = re.sub(r"^```.*?^```", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    named = {
        flag
        for code in re.findall(r"`((?:--|mara-)[^`]+)`", running_text)
        for flag in re.findall(r"--[a-z][a-z-]*", code)
    }
    assert named <= known, named - known


def test_the_bundle_page_names_every_field():
    page = text_of(DOCS / "reference" / "bundle.md")
    kinds = (m.ModelFacts, m.AgentFacts, m.GraphFacts, m.EngineFacts, m.TokenizerFacts, m.FileEntry, m.ModelShape)
    for kind in (m.Manifest, *kinds):
        for field in fields(kind):
            assert re.search(rf"\b{field.name}\b", page), f"{kind.__name__}.{field.name}"


def test_the_export_page_has_the_table_of_targets():
    rows = re.findall(
        r"^\| `(\w[\w-]*)` \| [^|]+ \| ([^|]+) \| ([^|]+) \|$", text_of(DOCS / "guide" / "export.md"), re.M
    )
    stated = {
        name: (tuple(precisions.split(", ")), tuple(lowerings.split(", "))) for name, precisions, lowerings in rows
    }
    assert stated == {name: (target.precisions, target.lowerings) for name, target in targets.TARGETS.items()}


def test_the_tree_names_every_module():
    """docs/internals/architecture.md: every module of the packages has a clause, and nothing else has one."""
    tree = text_of(DOCS / "internals" / "architecture.md").split("## The tree")[1].split("```text\n")[1].split("```")[0]
    folders: list[str] = []
    named = set()
    for line in tree.split("runtime/jetson")[0].splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        for name in re.split(r"\s{2,}", line.strip())[0].split(", "):
            if name.endswith("/"):
                folders[depth:] = [name.strip("/")]
            else:
                named.add("/".join([*folders[:depth], name]))
    modules = {path.relative_to(ROOT).as_posix() for path in MODULES if not path.name.startswith("__")}
    assert named >= modules, sorted(modules - named)
    assert named <= modules, sorted(named - modules)


def test_files_named_in_code_and_documents_exist():
    named = re.compile(r"(?<![\w/])(?:docs|benchmarks|tests|examples)/[\w/.-]+\.(?:md|py|sh)\b")
    for path in (*MODULES, *PAGES):
        for name in named.findall(text_of(path)):
            assert (ROOT / name).exists(), f"{path.relative_to(ROOT)}: {name}"
