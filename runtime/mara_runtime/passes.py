"""Filling the KV cache, and finding the row at fault where a pass returns values that are not finite.

Both are generators that yield passes and receive their outputs, as the decode loop is.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import NoReturn, TypeVar

import numpy as np

from mara_runtime.engines.base import Pass, StepOutput, is_finite
from mara_runtime.engines.kv_cache import KVCache
from mara_runtime.errors import NumericsError
from mara_runtime.schedule.base import ALONE, Company
from mara_runtime.tensors import PREFILL_ROWS

SHARED_PREFILL_ROWS = 64
"""Rows of one prefill pass while other conversations wait for it."""

T = TypeVar("T")
Passes = Generator[Pass, StepOutput, T]


def fill(cache: KVCache, tokens: Sequence[int], company: Company = ALONE) -> Passes[StepOutput]:
    """Run what the cache lacks of `tokens`, at least the last one; returns the last output, of one head row.

    company: conversations that wait for each of these passes.
    """
    out: StepOutput
    while (start := len(cache.tokens)) < len(tokens):
        chunk = tokens[start : start + (SHARED_PREFILL_ROWS if company.conversations else PREFILL_ROWS)]
        out = yield Pass.prefill(chunk, start, last=start + len(chunk) == len(tokens))
        cache.extend(chunk)
    return out


def find_fault(cache: KVCache, before: Sequence[int], work: Pass, *, judged: bool) -> Passes[NoReturn]:
    """Raise NumericsError for the pass `work` after the tokens `before`, naming the position and what is at fault.

    A NaN reaches other rows of its pass, so the rows are run again, one at a time, on a clean cache.
    judged: the agents' margins count, too.
    """
    cache.clear()
    if before and not is_finite((yield from fill(cache, before))):
        before, work, judged = (), Pass(before, range(len(before)), 0), False
    for token, position in zip(work.tokens, work.positions, strict=True):
        out = yield replace(Pass.full_outputs([int(token)], [position], position), mix=work.mix)
        _check_row(out, int(token), position, judged)
    raise NumericsError(
        f"a pass at position {len(before)} returned values that are not finite, and finite ones when repeated: "
        "run again; if it happens again, suspect the memory or the driver"
    )


def _check_row(out: StepOutput, token: int, position: int, judged: bool) -> None:
    assert out.hidden is not None
    assert out.logits is not None
    if not np.isfinite(out.hidden).all():
        raise NumericsError(
            f"the hidden state at position {position} (token {token}) is not finite: the model's weights or its "
            "precision are at fault; export it again, with a higher precision if it is quantised"
        )
    # -inf alone rules a token out; NaN, +inf, or nothing but -inf leaves no probabilities
    if np.isnan(out.logits).any() or not np.isfinite(out.logits.max()):
        raise NumericsError(
            f"the logits after position {position} are not finite: the model's LM head or its precision is at fault; "
            "export it again, with a higher precision if it is quantised"
        )
    if judged and not np.isfinite(out.margins).all():
        raise NumericsError(f"the agents' margin at position {position} is not finite: their weights are at fault")
