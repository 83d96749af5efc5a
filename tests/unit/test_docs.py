"""The documents are current and their links lead somewhere."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]


def test_the_command_page_is_made_from_the_help_texts(monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")
    spec = importlib.util.spec_from_file_location("make_commands", ROOT / "docs" / "make_commands.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text(encoding="utf-8") == module.page(), "run `make docs`"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), target


def test_the_bundle_page_names_every_field():
    """docs/bundle.md against the dataclasses that read the manifest."""
    from dataclasses import fields

    from mara_runtime import manifest as m

    page = (ROOT / "docs" / "bundle.md").read_text(encoding="utf-8")
    for kind in (
        m.Manifest,
        m.ModelFacts,
        m.AgentFacts,
        m.GraphFacts,
        m.EngineFacts,
        m.TokenizerFacts,
        m.FileEntry,
        m.ModelShape,
    ):
        for field in fields(kind):
            assert re.search(rf"\b{field.name}\b", page), f"{kind.__name__}.{field.name}"
