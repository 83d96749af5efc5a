"""Clients and checks that are too large for everybody's environment, in one of their own: `make test-clients`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.transformers5 import ROOT, environment

TESTS = "test_langchain.py", "test_schemathesis.py"


def main() -> None:
    """Run the tests there. Exits as pytest does."""
    with environment("clients", "", "--no-compile", "-c", ROOT / "constraints.txt") as (python, variables):
        tests = [Path(__file__).parent / test for test in TESTS]
        command = [python, "-m", "pytest", "-q", *(sys.argv[1:] or ["-m", "not long"]), *tests]
        code = subprocess.run(command, cwd=ROOT, env=variables).returncode
    sys.exit(code)


if __name__ == "__main__":
    main()
