"""Bundles under lm-eval: `make test-eval`.

In an environment of its own, which sees the packages of this one and has lm-eval in front of them.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.transformers5 import ROOT, environment


def main() -> None:
    """Run the tests there. Exits as pytest does."""
    with environment("eval", "lm-eval", "--no-compile", "-c", ROOT / "constraints.txt") as (python, variables):
        command = [python, "-m", "pytest", "-q", *sys.argv[1:], Path(__file__).parent]
        code = subprocess.run(command, cwd=ROOT, env={**variables, "HF_HUB_OFFLINE": "1"}).returncode
    sys.exit(code)


if __name__ == "__main__":
    main()
