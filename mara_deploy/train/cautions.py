"""What a user should know before relying on the agent of a training run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def cautions(rows: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> list[str]:
    """One sentence each; none for a run that made updates. rows: of the log; config: as in run.json."""
    if not rows or rows[-1]["updates"]:
        return []
    last, start = rows[-1], config["start_transitions"]
    never, resume = "the agent was never updated", "continue with --resume and more --episodes"
    if not any(row["decision_share"] for row in rows):
        return [
            f"{never}: the {last['episodes']} answers contain no decisions, as every position had a single candidate; "
            f"start a new run with a higher --top-p or --top-k (now {config['top_p']} and {config['top_k']})"
        ]
    if last["transitions"] < start:
        return [
            f"{never}: {last['episodes']} episodes collected {last['transitions']} of the {start} transitions of "
            f"--start-transitions; {resume}, or start a new run with fewer --start-transitions"
        ]
    return [
        f"{never}: --updates-per-episode {config['updates_per_episode']} makes no update due in {last['episodes']} "
        f"episodes; {resume}"
    ]
