"""Write docs/commands.md from the commands' own help texts; tests/unit/test_docs.py checks that it is current.

make docs
"""

from __future__ import annotations

import os
from pathlib import Path

os.environ["COLUMNS"] = "110"  # argparse wraps to the terminal
PAGE = Path(__file__).with_name("commands.md")


def page() -> str:
    """The text of commands.md."""
    from mara_deploy.commands import bench, build, eval, export, inspect, run, train
    from mara_deploy.demo import __main__ as demo
    from mara_deploy.demo import remake
    from mara_deploy.demo import train as demo_lm

    parts = ["# Commands\n\nMade from the commands' help texts by `make docs`.\n"]
    for module in (export, build, run, inspect, bench, train, eval, demo, demo_lm, remake):
        options = module.parser()
        parts.append(f"## {options.prog}\n\n```text\n{options.format_help().rstrip()}\n```\n")
    parts.append(
        "Every command ends with exit code 0, or with exit code 2 and one line on stderr when something is wrong that\n"
        "its user can mend.\n"
    )
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
