"""Write docs/reference/commands.md from the commands' help texts: `make docs`. A test checks that it is current."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["COLUMNS"] = "110"  # argparse wraps to the terminal
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # examples is not installed
PAGE = Path(__file__).parent / "reference" / "commands.md"


def page() -> str:
    """The text of commands.md."""
    from examples.demo_lm import __main__ as remake
    from examples.demo_lm import train as demo_lm
    from mara_deploy.commands import agent, bench, build, eval, export, inspect, memory, run, serve, sign, train
    from mara_deploy.demo import __main__ as demo

    parts = ["# Commands\n\nGenerated from the help texts by `make docs`.\n"]
    for module in (export, agent, build, run, serve, inspect, sign, memory, bench, train, eval, demo, demo_lm, remake):
        options = module.parser()
        helps = [each.format_help().rstrip() for each in (options, *getattr(options, "commands", {}).values())]
        parts.append(f"## {options.prog}\n\n" + "\n".join(f"```text\n{shown}\n```\n" for shown in helps))
    parts.append(
        "Every command exits with code 0, or with code 2 and one line on stderr for an error that the user can fix.\n"
    )
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
