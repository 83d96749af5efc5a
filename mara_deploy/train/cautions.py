"""What a training run came to that a person should know before taking its agent for a trained one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def cautions(rows: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> list[str]:
    """One sentence each; none for a run that learned. rows: of the log; config: as run.json keeps it."""
    if not rows or rows[-1]["updates"]:
        return []
    last, start = rows[-1], config["start_transitions"]
    never, more = "the agent was never updated", "go on with --resume and more --episodes"
    if not any(row["decision_share"] for row in rows):
        return [
            f"{never}: no decision was ever met, as each position of the {last['episodes']} answers had one candidate "
            f"alone; begin a new run with a higher --top-p or --top-k ({config['top_p']} and {config['top_k']} now)"
        ]
    if last["transitions"] < start:
        return [
            f"{never}: {last['transitions']} of the {start} transitions of --start-transitions were collected in "
            f"{last['episodes']} episodes; {more}, or begin a new run with fewer --start-transitions"
        ]
    return [
        f"{never}: with --updates-per-episode {config['updates_per_episode']} none was due in {last['episodes']} "
        f"episodes; {more}"
    ]
