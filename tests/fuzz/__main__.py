"""Fuzzing what comes from outside: does anything but the project's own errors come back?

    python -m tests.fuzz BUNDLE [--surface NAME …] [--cases 10000] [--seed 0] [--only CASE]

BUNDLE has a tokenizer and a chat template, as the demo's has. A case is a function of surface, seed and number, so that
--only runs it again. A case that takes 10 s ends the process, with a traceback of where it was. The last line is a JSON
object: for each surface the cases, how many were refused, the slowest in seconds, and the growth of memory in MB.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

from mara_runtime.errors import MaraError
from tests.fuzz.surfaces import SURFACES

LONGEST_S = 10
MOST_GROWTH_MB = 1024
MOST_LETTERS = 1000


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("bundle", type=Path)
    options.add_argument("--surface", nargs="+", choices=SURFACES, default=list(SURFACES))
    options.add_argument("--cases", type=int, default=10_000)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--only", type=int)
    args = options.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.surface:
            copy = Path(shutil.copytree(args.bundle, Path(folder, name)))
            found[name] = run(name, copy, args.seed, range(args.cases) if args.only is None else [args.only])
    print(json.dumps(found))
    return 0


def run(name: str, folder: Path, seed: int, cases: Any) -> dict[str, Any]:
    """Raises what a case raises, but for the project's errors."""
    surface = SURFACES[name](folder)
    refused, slowest, before = 0, 0.0, _peak_mb()
    for case in cases:
        begun = time.perf_counter()
        print(f"{name}: case {case} of seed {seed}", file=sys.stderr, end="\r")
        faulthandler.dump_traceback_later(LONGEST_S, exit=True)
        try:
            surface(Random(f"{name} {seed} {case}"))
        except MaraError as error:
            refused += 1
            if len(str(error)) > MOST_LETTERS or "\n" in str(error):
                raise AssertionError(f"{name}: case {case} of seed {seed} has no short line: {error}"[:1000]) from error
        except BaseException:
            print(f"{name}: case {case} of seed {seed}", file=sys.stderr)
            raise
        faulthandler.cancel_dump_traceback_later()
        slowest = max(slowest, time.perf_counter() - begun)
        assert _peak_mb() - before < MOST_GROWTH_MB, f"{name}: case {case} of seed {seed} takes too much memory"
    return {
        "cases": len(cases),
        "refused": refused,
        "slowest_s": round(slowest, 2),
        "growth_mb": round(_peak_mb() - before),
    }


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    sys.exit(main())
