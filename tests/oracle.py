"""The reference procedure (tests/reference.py) on Hugging Face eager: the oracle of the exported product.

Slow on purpose: one candidate per forward pass, each on its own copy of the KV cache, so that no candidate can attend
to a rejected one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from tests import reference
from tests.reference import Candidates, Options


@dataclass
class OracleResult:
    """What the sequential procedure emitted and counted."""

    token_ids: list[int]
    """emitted ids, a final EOS included, the prompt not"""
    finish_reason: str
    """"stop" when an EOS id was emitted, else "length" """
    counters: dict[str, Any]
    """in the form of `Stats.algorithm`; none for an empty answer"""
    gaps: list[float]
    """for each emitted position, the smallest change of a number that could change the outcome there"""
    positions: list[dict[str, Any]]
    """for each emitted position: position, candidates, examined, margins (by token), token, rank, forced, gap_parts"""


def candidates(logits: torch.Tensor, *, top_k: int, top_p: float) -> Candidates:
    """The candidate list of one position from its logits (V,)."""
    return reference.candidates(logits.float().tolist(), top_k, top_p)


@dataclass
class _Node:
    """A prefix that the model has run; see `reference.Node`."""

    model: Any
    agent: Any
    out: Any
    """of the model, its KV cache included"""

    @cached_property
    def logits(self) -> list[float]:
        logits: list[float] = self.out.logits[0, -1].float().tolist()
        return logits

    @property
    def margin(self) -> float:
        state = self.out.hidden_states[-1][0, -1].float()
        if not bool(torch.isfinite(state).all()):
            raise ValueError("non-finite hidden state")
        z = self.agent(state[None])[0].float()
        margin = float(z[1] - z[0])
        if not math.isfinite(margin):
            raise ValueError("non-finite margin")
        return margin

    def then(self, token: int) -> _Node:
        return _Node(self.model, self.agent, _forward(self.model, [token], copy.deepcopy(self.out.past_key_values)))


@torch.no_grad()
def decode(
    model: Any,
    agent: Any,
    prompt_ids: Sequence[int],
    *,
    eos_ids: Sequence[int],
    max_new_tokens: int = 64,
    fallback: str = "first",
    **options: Any,
) -> OracleResult:
    """Decode one prompt sequentially.

    `model` is called as a Hugging Face causal LM, `agent` maps states (1, D) to two logits (1, 2). options: see
    `reference.Options`. Raises ValueError for a non-finite state, naming its position.
    """
    node = _Node(model, agent, _forward(model, list(prompt_ids), None))
    answer = reference.decode(
        node, len(prompt_ids), Options(**options), fallback=fallback, eos=eos_ids, limit=max_new_tokens
    )
    return OracleResult(
        answer.tokens,
        "stop" if answer.tokens and answer.tokens[-1] in eos_ids else "length",
        answer.counts[-1] if answer.counts else {},
        [min(position.gaps.values()) for position in answer.positions],
        [_as_dict(position) for position in answer.positions],
    )


def _as_dict(position: reference.Position) -> dict[str, Any]:
    margins = {position.candidates[rank - 1]: margin for rank, margin in position.margins.items()}
    return {
        "position": position.position,
        "candidates": position.candidates,
        "examined": list(margins),
        "margins": margins,
        "token": position.token,
        "rank": position.rank,
        "forced": position.forced,
        "gap_parts": position.gaps,
    }


def _forward(model: Any, ids: list[int], cache: Any) -> Any:
    """One pass over `ids` after `cache`, which it changes."""
    input_ids = torch.tensor([ids], dtype=torch.long, device=getattr(model, "device", None))
    return model(input_ids=input_ids, past_key_values=cache, use_cache=True, output_hidden_states=True)
