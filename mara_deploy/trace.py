"""A decision as plain values, for traces and servers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mara_runtime.stats import Step
    from mara_runtime.text import TextSide


def record(step: Step, side: TextSide | None) -> dict[str, Any]:
    """A decision as plain values, with the text of each token if the bundle has a tokenizer."""

    def named(token: int) -> dict[str, Any]:
        if side is None:
            return {"token": token}
        return {"token": token, "text": side.tokenizer.decode([token], skip_special_tokens=False)}

    found = step.candidates
    ranked = zip(found.ids.tolist(), found.probabilities.tolist(), found.log_probabilities.tolist(), strict=True)
    return {
        "position": step.position,
        **named(step.token),
        "rank": step.rank,
        "forced": step.forced,
        "drafted": step.drafted,
        "candidates": [
            {
                "rank": rank,
                **named(token),
                "probability": round(probability, 6),
                "log_probability": round(log_probability, 6),
                "margin": step.margins.get(rank),
            }
            for rank, (token, probability, log_probability) in enumerate(ranked, start=1)
        ],
    }
