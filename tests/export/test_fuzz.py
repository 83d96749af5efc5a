"""Damaged and hostile files: no change of a bundle goes unnoticed, and nothing but the project's own errors comes back.

`python -m tests.fuzz BUNDLE` runs as many cases as wanted, and one again by its number.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys

import pytest

from mara_runtime.bundle import Bundle
from mara_runtime.errors import BundleError
from mara_runtime.manifest import MANIFEST_FILE
from mara_runtime.manifest_reader import parse
from tests.fuzz.surfaces import SURFACES


@pytest.mark.parametrize(
    ("model", "cases", "surfaces"),
    [
        ("qwen2", 300, SURFACES),
        pytest.param("demo", 10_000, SURFACES.keys() - {"files"}, marks=pytest.mark.long),
        pytest.param("demo", 20_000, {"files"}, marks=pytest.mark.long),
    ],
    ids=["few", "many", "files"],
)
def test_no_case_ends_in_silence_a_traceback_or_never(bundle, model, cases, surfaces) -> None:
    """In a process of its own, which a case might end or fill."""
    command = [sys.executable, "-m", "tests.fuzz", bundle(model), "--cases", str(cases), "--surface", *sorted(surfaces)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for found in json.loads(done.stdout.splitlines()[-1]).values():
        assert found["cases"] == cases
        assert 0.4 * cases < found["refused"] <= cases


@pytest.mark.long
@pytest.mark.parametrize("other", range(3))
def test_no_byte_of_the_manifest_can_be_changed_unnoticed(bundle, other) -> None:
    folder = bundle("demo")
    text = (folder / MANIFEST_FILE).read_text(encoding="utf-8")
    whole = Bundle.open(folder).manifest
    for at, letter in enumerate(text):
        changed = text[:at] + chr(ord(letter) ^ (1, 2, 32)[other]) + text[at + 1 :]
        with contextlib.suppress(BundleError):
            assert parse(changed, "here") == whole, text[max(0, at - 40) : at + 40]
