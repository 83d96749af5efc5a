"""The runtime at the lowest versions that pyproject.toml permits, compared with this environment: `make test-lowest`.

Exports the demo's bundle here, and decodes it both here and in a new environment with the runtime, its dependencies and
ONNX Runtime at their lower bounds. Tokens and counters must be equal.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

import tomllib

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "I have never tried to oil a squeaky door. Where do I start?"
WAYS = [
    [],
    ["--schedule", "one-by-one"],
    ["--schedule", "together", "--draft", "4"],
    ["--strategy", "max_prob", "--fallback", "last"],
    ["--strategy", "random", "--order", "reversed"],
    ["--no-align"],
    ["--no-align", "--sample"],
]
WORK = (
    *("forwards", "rows", "drafted", "confirmed"),
    *("prefill_ms", "decode_ms", "engine_ms", "tokens_per_second", "engine"),
)
"""Statistics that may differ."""


def lowest() -> list[str]:
    """Requirements of the base install and of the extra `cpu`, pinned to their lower bounds."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = [*project["dependencies"], *project["optional-dependencies"]["cpu"]]
    bounds = [re.fullmatch(r"([\w-]+)>=([\w.]+)(,!=[\w.]+)*", requirement) for requirement in requirements]
    assert all(bounds), requirements
    return [f"{bound[1]}=={bound[2]}" for bound in bounds if bound]


def outputs(command: list[str], bundle: Path) -> list[dict[str, Any]]:
    """The output of mara-run for each of WAYS, without what may differ."""
    answers: list[dict[str, Any]] = []
    for way in WAYS:
        argv = [*command, str(bundle), "--prompt", PROMPT, "--max-new-tokens", "60", "--json", *way]
        answer = json.loads(subprocess.run(argv, check=True, stdout=subprocess.PIPE).stdout)
        for name in WORK:
            del answer["stats"][name]
        answer["stats"]["smallest_margin"] = round(answer["stats"]["smallest_margin"] or 0.0, 4)
        answers.append(answer)
    return answers


def main() -> None:
    """Compare both environments. Exits with 1 where answers differ by more than the bundle's noise."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    options.add_argument("python", nargs="?", help="interpreter of the new environment (default: this one)")
    python = options.parse_args().python
    commands = Path(sys.executable).parent
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if python is None:
            venv.create(folder / "env", with_pip=True)
        else:
            subprocess.run([python, "-m", "venv", folder / "env"], check=True)
        there = folder / "env" / "bin"
        pip = [there / "python", "-m", "pip", "--disable-pip-version-check", "-q", "install"]
        subprocess.run([*pip, ROOT, *lowest()], check=True)
        bundle = folder / "bundle"
        export = [commands / "mara-export", "--model", "demo", "--agent", "demo", "--out", bundle, "--quiet"]
        subprocess.run(export, check=True)
        ours = outputs([str(commands / "mara-run")], bundle)
        theirs = outputs([str(there / "mara-run")], bundle)
    different, excused = [], 0
    for way, expected, got in zip(WAYS, ours, theirs, strict=True):
        if expected != got and expected["stats"]["within_noise"]:  # another version may decide otherwise there
            excused += 1
        elif expected != got:
            different.append(" ".join(way) or "default")
    if different:
        sys.exit(f"{', '.join(lowest())}: answers differ with {'; '.join(different)}")
    note = f", {excused} more differ within the noise" if excused else ""
    print(f"{', '.join(lowest())}: the same answers in {len(WAYS) - excused} ways of decoding{note}")


if __name__ == "__main__":
    main()
