"""The sequential accept/reject algorithm on Hugging Face eager: the oracle of every other schedule.

Written from the specification of the method (arXiv 2505.19743) alone, without reading the product's decoder.
It is slow on purpose: one candidate a forward pass, each on its own copy of the KV cache, so that no
candidate can attend to a rejected one. Torch in float32; sums of probabilities in float64.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

STRATEGIES = ("top1", "max_prob", "random")
ORDERS = ("ranked", "best_last", "reversed")
FALLBACKS = ("first", "last")


@dataclass
class OracleResult:
    """What the sequential procedure emitted and counted."""

    token_ids: list[int]
    """the emitted ids, a final EOS included, the prompt not"""
    finish_reason: str
    """"stop" when an EOS id was emitted, else "length" """
    counters: dict[str, Any]
    """tokens, decisions, examined, forced, accepted_rank, candidate_counts, smallest_margin"""
    gaps: list[float]
    """for each emitted position, the smallest number whose change of sign could change the outcome there"""
    positions: list[dict[str, Any]]
    """for each emitted position, for debugging: the keys are those of `decode`'s append"""


@dataclass
class Candidates:
    """The candidate list of one position, and how far it is from being another list."""

    ids: list[int]
    """best first"""
    logit_gap: float
    """smallest difference of neighbours in rank, among the candidates and to the next id after them (nats)"""
    nucleus_gap: float
    """smallest distance of an ascending cumulative probability from 1 - top_p"""


def candidates(logits: torch.Tensor, *, top_k: int, top_p: float) -> Candidates:
    """The candidate list of one position from its logits (V,)."""
    logits = logits.float()
    if bool(torch.isnan(logits).any()) or not bool(torch.isfinite(logits.max())):
        raise ValueError("non-finite logits")
    # A stable sort keeps equal logits in the order of their ids.
    ranked, ids = torch.sort(logits, descending=True, stable=True)
    k = min(top_k, len(ranked))
    probabilities = ranked[:k].double().softmax(dim=0)  # (k,), renormalised over the survivors
    # tail[i] = what rank i and all below it sum to: the ascending cumulative probability of rank i.
    tail = probabilities.flip(0).cumsum(0).flip(0)
    n = max(1, int((tail > 1.0 - top_p).sum()))  # tail descends, so those above the limit are the first n

    # A swap matters inside the list, or across its end. If the list ends at rank k that is the top-k limit;
    # if it ends above, ids around rank k are dropped by top-p in either order.
    edge = ranked[: n + 1].double()
    logit_gap = float((edge[:-1] - edge[1:]).min()) if len(edge) > 1 else float("inf")
    # The best stays whatever its sum. At top_p = 1 the limit is 0: only an underflowing probability reaches it.
    if top_p < 1.0:
        nucleus_gap = float((tail[1:] - (1.0 - top_p)).abs().min()) if k > 1 else float("inf")
    else:
        possible = probabilities[torch.isfinite(ranked[:k])]
        nucleus_gap = 0.0 if float(possible.min()) < 1e-30 else float("inf")
    return Candidates([int(i) for i in ids[:n]], logit_gap, nucleus_gap)


@torch.no_grad()
def decode(
    model: Any,
    agent: Any,
    prompt_ids: Sequence[int],
    *,
    eos_ids: Sequence[int],
    top_k: int = 40,
    top_p: float = 0.95,
    max_new_tokens: int = 64,
    strategy: str = "top1",
    order: str = "ranked",
    fallback: str = "first",
    threshold: float = 0.0,
    seed: int = 0,
) -> OracleResult:
    """Decode one prompt sequentially.

    `model` is called as a Hugging Face causal LM, `agent` maps states (1, D) to two logits (1, 2).
    Raises ValueError for an unknown option and for a non-finite state, naming its position.
    """
    for name, value, known in (
        ("strategy", strategy, STRATEGIES),
        ("order", order, ORDERS),
        ("fallback", fallback, FALLBACKS),
    ):
        if value not in known:
            raise ValueError(f"{name}: {value!r}, must be one of {', '.join(known)}")
    if not prompt_ids or top_k < 1 or not 0.0 <= top_p <= 1.0 or max_new_tokens < 0:
        raise ValueError("the prompt must not be empty, top_k >= 1, 0 <= top_p <= 1, max_new_tokens >= 0")

    rng = np.random.default_rng(seed)
    token_ids: list[int] = []
    gaps: list[float] = []
    positions: list[dict[str, Any]] = []
    decisions = examined_total = forced_total = 0
    accepted_rank: Counter[int] = Counter()
    candidate_counts: Counter[int] = Counter()
    smallest_margin: float | None = None
    finish_reason = "length"

    out = _forward(model, list(prompt_ids), None)
    logits, cache = out.logits[0, -1], out.past_key_values

    while len(token_ids) < max_new_tokens:
        position = len(prompt_ids) + len(token_ids)
        try:
            found = candidates(logits, top_k=top_k, top_p=top_p)
        except ValueError as error:
            raise ValueError(f"position {position}: {error}") from error
        ids = found.ids
        candidate_counts[len(ids)] += 1
        margins: dict[int, float] = {}  # in the order of examination
        gap_parts = {"logit": found.logit_gap, "nucleus": found.nucleus_gap}
        forced = False

        if len(ids) == 1:
            token, taken = ids[0], None
        else:
            decisions += 1
            outputs: dict[int, Any] = {}
            for candidate in _in_order(ids, order):
                outputs[candidate] = _forward(model, [candidate], copy.deepcopy(cache))
                state = outputs[candidate].hidden_states[-1][0, -1].float()
                if not bool(torch.isfinite(state).all()):
                    raise ValueError(f"position {position}: candidate {candidate} has a non-finite hidden state")
                z = agent(state[None])[0].float()
                margins[candidate] = float(z[1] - z[0])
                if not np.isfinite(margins[candidate]):
                    raise ValueError(f"position {position}: candidate {candidate} has a non-finite margin")
                if strategy == "top1" and margins[candidate] > threshold:
                    break
            accepted = [c for c in margins if margins[c] > threshold]

            if not accepted:
                forced = True
                token = ids[0] if fallback == "first" else ids[-1]
            elif strategy == "top1":
                token = accepted[0]
            elif strategy == "max_prob":
                best = max(margins[c] for c in accepted)
                token = next(c for c in ids if margins[c] == best)
            else:
                token = accepted[int(rng.integers(len(accepted)))]

            distances = [abs(m - threshold) for m in margins.values()]
            smallest_margin = min(distances + ([] if smallest_margin is None else [smallest_margin]))
            gap_parts["margin"] = min(distances)
            if strategy == "max_prob" and len(accepted) > 1:
                best_two = sorted((margins[c] for c in accepted), reverse=True)[:2]
                gap_parts["best_two"] = best_two[0] - best_two[1]
            examined_total += len(margins)
            forced_total += forced
            if not forced:
                accepted_rank[ids.index(token) + 1] += 1
            taken = outputs[token]  # whoever is picked has been run: a fallback only after all the others

        token_ids.append(token)
        gaps.append(min(gap_parts.values()))
        positions.append(
            {
                "position": position,
                "candidates": ids,
                "examined": list(margins),
                "margins": margins,
                "token": token,
                "rank": ids.index(token) + 1,
                "forced": forced,
                "gap_parts": gap_parts,
            }
        )
        if token in eos_ids:
            finish_reason = "stop"
            break
        if len(token_ids) < max_new_tokens:
            if taken is None:
                taken = _forward(model, [token], cache)
            logits, cache = taken.logits[0, -1], taken.past_key_values

    counters = {
        "tokens": len(token_ids),
        "decisions": decisions,
        "examined": examined_total,
        "forced": forced_total,
        "accepted_rank": dict(sorted(accepted_rank.items())),
        "candidate_counts": dict(sorted(candidate_counts.items())),
        "smallest_margin": smallest_margin,
    }
    return OracleResult(token_ids, finish_reason, counters, gaps, positions)


def _in_order(ids: list[int], order: str) -> list[int]:
    """The candidates (best first) in the order of examination: v0, v1 or from the worst up."""
    if order == "ranked":
        return list(ids)
    if order == "best_last":
        return ids[1:] + ids[:1]
    return ids[::-1]


def _forward(model: Any, ids: list[int], cache: Any) -> Any:
    """One pass over `ids` after `cache`, which it may change: give a copy to whoever must not share it."""
    input_ids = torch.tensor([ids], dtype=torch.long, device=getattr(model, "device", None))
    return model(input_ids=input_ids, past_key_values=cache, use_cache=True, output_hidden_states=True)
