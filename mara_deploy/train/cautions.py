"""What a user should know before relying on the agent of a training run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Rows = Sequence[Mapping[str, Any]]
"""Of the log."""
_OUTWEIGHS = 10
"""Times the range of the scores that the entropy of an answer is worth, before it counts as all that is learned."""


def cautions(rows: Rows, config: Mapping[str, Any]) -> list[str]:
    """One sentence each; none for a run that learned. config: as in run.json."""
    if not rows:
        return []
    return [*([] if rows[-1]["updates"] else [_never_updated(rows, config)]), *troubles(rows, config)]


def troubles(rows: Rows, config: Mapping[str, Any]) -> Iterator[str]:
    """What can be said of a run in progress already. Each begins with other words, up to a colon."""
    first, last = rows[0], rows[-1]
    if last["episodes"] > 1 and all(
        row["score_spread"] == 0 and math.isclose(row["score"], first["score"], abs_tol=1e-12) for row in rows
    ):
        yield (
            f"all answers have the same score, {last['score']:g}: there is nothing to learn from it; compare --score "
            "with the answers in the report"
        )
    if not any(row["finished_share"] for row in rows):
        yield (
            "no answer has ended by itself: all were cut off, and the score rates what was there; raise "
            f"--max-new-tokens (now {config['max_new_tokens']}), or check the end tokens and the chat template of the "
            "model"
        )
    recent = rows[-max(1, len(rows) // 10) :]
    spread = max(row["score_spread"] for row in recent)
    bonus = min(row["alpha"] * row["entropy"] * row["decision_share"] * row["answer_tokens"] for row in recent)
    if last["updates"] and bonus > _OUTWEIGHS * spread > 0:
        yield (
            f"the entropy bonus outweighs the score: α is {last['alpha']:.3g}, and an answer's entropy is worth "
            f"{bonus:.3g} where its score ranges over {spread:.3g}; start a new run with a lower --target-entropy (now "
            f"{config['target_entropy']}) or a higher --weight of the scores"
        )


def _never_updated(rows: Rows, config: Mapping[str, Any]) -> str:
    last, start = rows[-1], config["start_transitions"]
    never, resume = "the agent was never updated", "continue with --resume and more --episodes"
    if not any(row["decision_share"] for row in rows):
        return (
            f"{never}: the {last['episodes']} answers contain no decisions, as every position had a single candidate; "
            f"start a new run with a higher --top-p or --top-k (now {config['top_p']} and {config['top_k']})"
        )
    if last["transitions"] < start:
        return (
            f"{never}: {last['episodes']} episodes collected {last['transitions']} of the {start} transitions of "
            f"--start-transitions; {resume}, or start a new run with fewer --start-transitions"
        )
    return (
        f"{never}: --updates-per-episode {config['updates_per_episode']} makes no update due in {last['episodes']} "
        f"episodes; {resume}"
    )
