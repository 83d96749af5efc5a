"""The runtime at the lowest versions that pyproject.toml permits, against this environment: run by `make test-lowest`.

A bundle of the demo is exported here and decoded in an environment of its own, which holds the runtime, its
dependencies and ONNX Runtime at their lower bounds, by `python` (default: this one). Tokens and counters must be equal.
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
"""Of the statistics, what may differ."""


def lowest() -> list[str]:
    """Requirements of the base install and of `cpu`, at their lower bounds."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["cpu"]]
    bounds = [re.fullmatch(r"([\w-]+)>=([\w.]+)", one) for one in wanted]
    assert all(bounds), wanted
    return [f"{bound[1]}=={bound[2]}" for bound in bounds if bound]


def answers(command: list[str], bundle: Path) -> list[dict[str, Any]]:
    """What mara-run prints for each way of decoding, without what may differ."""
    found: list[dict[str, Any]] = []
    for way in WAYS:
        argv = [*command, str(bundle), "--prompt", PROMPT, "--max-new-tokens", "60", "--json", *way]
        answer = json.loads(subprocess.run(argv, check=True, stdout=subprocess.PIPE).stdout)
        for name in WORK:
            del answer["stats"][name]
        answer["stats"]["smallest_margin"] = round(answer["stats"]["smallest_margin"] or 0.0, 4)
        found.append(answer)
    return found


def main() -> None:
    """Compare, and say what was compared."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    options.add_argument("python", nargs="?", help="the interpreter (default: this one)")
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
        subprocess.run([*pip, *lowest()], check=True)
        subprocess.run([*pip, "--no-deps", ROOT], check=True)
        bundle = folder / "bundle"
        export = [commands / "mara-export", "--model", "demo", "--agent", "demo", "--out", bundle, "--quiet"]
        subprocess.run(export, check=True)
        ours = answers([str(commands / "mara-run")], bundle)
        theirs = answers([str(there / "mara-run")], bundle)
    different, excused = [], 0
    for way, one, two in zip(WAYS, ours, theirs, strict=True):
        if one != two and one["stats"]["within_noise"]:  # there another version may choose otherwise
            excused += 1
        elif one != two:
            different.append(" ".join(way) or "default")
    if different:
        sys.exit(f"{', '.join(lowest())}: other answers by {'; '.join(different)}")
    told = f", {excused} more within the noise" if excused else ""
    print(f"{', '.join(lowest())}: the same answers in {len(WAYS) - excused} ways of decoding{told}")


if __name__ == "__main__":
    main()
