"""Comparing an engine with the reference: the differences, and which of them miss a Gate."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mara_export.parity.rows import F32, Case, Side

LARGEST_FLOAT16 = float(np.finfo(np.float16).max)
RANKS = 40
NOISE_FLOOR = 1e-5
"""Least noise, relative to the reference's largest value: float32 sums of thousands of terms have about a tenth of it
as rounding error, and two runs of the same kernels may happen to agree to the last bit."""
NOISE_FACTOR = 4.0
"""Gaps below this many times the measured noise are not compared: both sides have rounding errors of their own, and the
noise is a maximum over fewer rows than are compared."""


Pairs = Sequence[tuple[Side, Side]]
"""(reference, engine) of each case."""


@dataclass(frozen=True)
class Gate:
    """What an export of one precision has to reach."""

    least_cosine: float
    greatest_difference: float
    """relative to the largest value of the reference"""
    differing: float = 0.0
    """share of the compared outcomes (best tokens, decisions) that may differ"""
    min_gap: float = 0.0
    """nats; a best token that leads by less is not compared, as rounding the weights may rightly overturn it"""
    all_ranks: bool = False
    """the order of the RANKS best tokens must agree, too, not only the best one"""
    rerouted: float = 0.0
    """share of rows to which rounding may give other experts, where there are any: the differences are those of the
    other rows, and of the outcomes as many more may differ"""


GATES = {
    "fp32": Gate(least_cosine=0.99999, greatest_difference=1e-4, all_ranks=True),
    "fp16": Gate(least_cosine=0.9999, greatest_difference=2e-2, differing=0.02, min_gap=0.05),
    "bf16": Gate(least_cosine=0.999, greatest_difference=0.1, differing=0.05, min_gap=0.2),
    "int8": Gate(least_cosine=0.99, greatest_difference=0.2, differing=0.05, min_gap=0.25),
    "int4": Gate(least_cosine=0.7, greatest_difference=1.0, differing=0.2, min_gap=1.0),
}
"""By precision. Below fp32 they are wide, as random and tiny models lose more to rounding than trained and large ones:
they catch a broken export, and the report says what was lost."""
REROUTED = 0.5
"""Of narrower precisions than fp32. Of random and tiny models up to half of the rows got other experts."""


def gate_of(precision: str, experts: int) -> Gate:
    """What an export has to reach whose layers have so many experts; 0: none."""
    gate = GATES[precision]
    return replace(gate, rerouted=REROUTED) if experts and precision != "fp32" else gate


@dataclass(frozen=True)
class Counts:
    """Outcomes of many rows, compared where the reference's gap exceeds a threshold."""

    compared: int
    within_noise: int
    """not compared"""
    differing: int
    """of those compared"""
    changed: int
    """of all"""

    @staticmethod
    def total(parts: Iterable[Counts]) -> Counts:
        """The sum of several."""
        return Counts(*(sum(column) for column in zip(*(asdict(part).values() for part in parts), strict=True)))


@dataclass(frozen=True)
class Report:
    """The differences of the two sides, how noisy each of them is, and what misses the gate."""

    prompts: int
    rows: int
    rerouted: float
    """share of rows, those that differ most, that `numbers` leave out"""
    numbers: dict[str, dict[str, float]]
    """hidden states and logits of the LLM, or an agent's margins: greatest difference relative to the largest value;
    but of margins the least cosine"""
    noise: dict[str, float]
    """of the same, NOISE_FACTOR and NOISE_FLOOR applied"""
    level_flips: float
    """of logits or margins, NOISE_FACTOR applied; 0 where nothing rounds activations"""
    outcomes: dict[str, Counts]
    """of the best token ("first") and the RANKS best ("ranks"), or of an agent's "decisions" """
    min_gap: dict[str, float]
    """nats; outcomes with a smaller gap were not compared: the noise, or the gate's min_gap if that is larger"""
    perplexity: dict[str, float] | None = None
    """of the texts among the prompts, "reference" and "exported"; None without texts, or where it overflows"""
    largest_activation: float | None = None
    """of the reference; None where the engine has float32's range"""
    parts: int = 1
    """in which the engine ran the graph"""
    failures: list[str] = field(default_factory=list)
    """each way in which the figures miss the gate"""

    @property
    def engine_noise(self) -> float:
        """What the manifest records for decoding: the noise of logits or margins, level flips included."""
        return max(self.noise["logits" if "logits" in self.noise else "margins"], self.level_flips)

    def to_json(self) -> dict[str, Any]:
        """For the manifest."""
        of_model = "logits" in self.numbers
        return {
            "passed": not self.failures,
            "prompts": self.prompts,
            "rows": self.rows,
            "rerouted": self.rerouted,
            **self.numbers,
            "noise": self.noise,
            **{name: asdict(counts) for name, counts in self.outcomes.items()},
            "min_gap": self.min_gap,
            **(
                {name: getattr(self, name) for name in ("perplexity", "largest_activation", "parts")}
                if of_model
                else {}
            ),
        }


def compare(
    cases: Sequence[Case], sides: Sequence[Side], gate: Gate, largest_activation: float | None = None
) -> Report:
    """Compare an engine's sides with the reference of the same cases, agents left out.

    largest_activation: of the reference, where float16 has to hold it: a CPU, which computes in float32, does not show
    what would overflow on a GPU.
    """
    pairs = [(case.reference, side) for case, side in zip(cases, sides, strict=True)]
    noise = _noise(pairs, "logits")
    gaps = {"first": max(noise, gate.min_gap), "ranks": noise}
    logits = [(reference.rows.logits, side.rows.logits) for reference, side in pairs]
    report = _report(pairs, ("hidden", "logits"), gaps, gate)
    outcomes = {
        "first": Counts.total(compare_ranks(a, b, gaps["first"], 1) for a, b in logits),
        "ranks": Counts.total(compare_ranks(a, b, gaps["ranks"]) for a, b in logits),
    }
    report = replace(
        report, outcomes=outcomes, perplexity=_perplexities(cases, sides), largest_activation=largest_activation
    )
    return replace(report, failures=[*_failures(report, gate)])


def compare_agent(cases: Sequence[Case], sides: Sequence[Side], index: int, gate: Gate) -> Report:
    """Compare the margins of one of the agents, the one of that index in all of them."""
    pairs = [(case.reference.of_agent(index), side.of_agent(index)) for case, side in zip(cases, sides, strict=True)]
    gap = _noise(pairs, "margins")
    report = _report(pairs, ("margins",), {"decisions": gap}, gate)
    decisions = Counts.total(compare_decisions(a.rows.margins, b.rows.margins, gap) for a, b in pairs)
    report = replace(report, outcomes={"decisions": decisions})
    return replace(report, failures=[*_failures(report, gate)])


def _report(pairs: Pairs, names: Sequence[str], gaps: dict[str, float], gate: Gate) -> Report:
    """What all reports have."""
    return Report(
        prompts=len(pairs),
        rows=sum(len(reference.rows.hidden) for reference, _ in pairs),
        numbers={name: _numbers(pairs, name, gate.rerouted) for name in names},
        rerouted=gate.rerouted,
        noise={name: _noise(pairs, name) for name in names},
        level_flips=NOISE_FACTOR * _largest(side.level_flips(names[-1]) for _, side in pairs),
        outcomes={},
        min_gap=gaps,
    )


def _failures(report: Report, gate: Gate) -> Iterator[str]:
    """Each way in which the figures miss the gate, in words. Comparisons are written so that NaN fails."""
    activation = report.largest_activation
    if activation is not None and not activation <= LARGEST_FLOAT16:
        yield f"activations reach {activation:,.0f}, and float16 ends at {LARGEST_FLOAT16:,.0f}: use bf16 or fp32"
    for name, numbers in report.numbers.items():
        greatest, cosine = numbers["greatest_difference"], numbers.get("least_cosine", 1.0)
        if not greatest <= gate.greatest_difference:
            yield f"{name}: greatest difference {greatest:.1e}, the gate is {gate.greatest_difference}"
        if not cosine >= gate.least_cosine:
            yield f"{name}: least cosine {cosine:.7f}, the gate is {gate.least_cosine}"
    for row, noise in (("recomputed", report.noise), ("perturbed", {[*report.noise][-1]: report.level_flips})):
        for name, value in noise.items():
            if not np.isfinite(value):
                yield f"{name}: not finite in a {row} row"
    for name, counts in report.outcomes.items():
        may_differ = gate.differing + gate.rerouted
        if (name != "ranks" or gate.all_ranks) and counts.differing > may_differ * counts.compared:
            yield (
                f"{name}: {counts.differing} of {counts.compared} differ that have a gap of more than "
                f"{report.min_gap[name]:.2g} nats"
            )


def _numbers(pairs: Pairs, name: str, left_out: float) -> dict[str, float]:
    """Both kinds of rows of the engine: each of them is used to decode. left_out: share of rows, the worst."""
    values = [(getattr(a.rows, name), getattr(b.rows, name)) for a, b in pairs]
    values += [(getattr(a.rows.tail(len(b.recomputed.margins)), name), getattr(b.recomputed, name)) for a, b in pairs]
    scale = np.max([np.abs(a).max() for a, _ in values])
    differences = np.concatenate([np.abs(a - b).reshape(len(a), -1).max(axis=1) for a, b in values])
    greatest = np.quantile(differences, 1 - left_out, method="lower")  # NaN if there is one
    numbers = {"greatest_difference": float(greatest) / float(scale or 1.0)}
    if name != "margins":  # one number per row has no direction
        angles = np.concatenate([cosines(a, b) for a, b in values])
        numbers["least_cosine"] = float(np.quantile(angles, left_out, method="higher"))
    return numbers


def _noise(pairs: Pairs, name: str) -> float:
    floor = NOISE_FLOOR * max(float(np.abs(getattr(a.rows, name)).max()) for a, _ in pairs)
    return float(np.maximum(NOISE_FACTOR * _largest(side.noise(name) for pair in pairs for side in pair), floor))


def _largest(values: Iterable[float]) -> float:
    return float(np.max([*values]))  # passes NaN on, as max does not


def _perplexities(cases: Sequence[Case], sides: Sequence[Side]) -> dict[str, float] | None:
    texts = [(case, side) for case, side in zip(cases, sides, strict=True) if case.is_text and len(case.tokens) > 1]
    values = {
        "reference": perplexity([(case.tokens, case.reference.rows.logits) for case, _ in texts]),
        "exported": perplexity([(case.tokens, side.rows.logits) for case, side in texts]),
    }
    return values if texts and all(map(np.isfinite, values.values())) else None


def perplexity(texts: Sequence[tuple[Sequence[int], F32]]) -> float:
    """exp of the mean negative log-likelihood of the tokens of texts: T tokens, and logits (≥ T, V) after each."""
    losses = []
    for tokens, rows in texts:
        x = rows[: len(tokens) - 1].astype(np.float64)
        greatest = x.max(axis=1)
        total = np.log(np.exp(x - greatest[:, None]).sum(axis=1)) + greatest
        losses += (total - x[np.arange(len(x)), list(tokens[1:])]).tolist()
    with np.errstate(over="ignore"):
        return float(np.exp(np.mean(losses))) if losses else 1.0


def compare_ranks(reference: F32, exported: F32, min_gap: float, ranks: int = RANKS) -> Counts:
    """Of logits (N, V): is the token at each of the best `ranks` ranks the same?

    A rank is compared where the reference's logit there is further than `min_gap` from both its neighbours.
    """
    count = min(ranks, reference.shape[1] - 1)
    order = _best(reference, count + 1)
    ranked = np.take_along_axis(reference, order, axis=1)
    gaps = np.pad(ranked[:, :-1] - ranked[:, 1:], ((0, 0), (1, 0)), constant_values=np.inf)  # to the better one
    clear = np.minimum(gaps[:, :-1], gaps[:, 1:]) > min_gap
    return _counts(clear, order[:, :count] != _best(exported, count))


def _best(logits: F32, count: int) -> NDArray[np.intp]:
    """Indices (N, count) of the largest of each row (N, V), in descending order."""
    some = np.argpartition(logits, -count, axis=1)[:, -count:]
    order = np.argsort(-np.take_along_axis(logits, some, axis=1), axis=1, kind="stable")
    return np.take_along_axis(some, order, axis=1)


def compare_decisions(reference: F32, exported: F32, min_gap: float) -> Counts:
    """Of N margins: are the same accepted? Compared where the reference's margin is further than `min_gap` from 0."""
    return _counts(np.abs(reference) > min_gap, (reference > 0) != (exported > 0))


def _counts(clear: NDArray[np.bool_], differing: NDArray[np.bool_]) -> Counts:
    return Counts(int(clear.sum()), int((~clear).sum()), int((clear & differing).sum()), int(differing.sum()))


def cosines(a: F32, b: F32) -> NDArray[np.float64]:
    """Cosines (N,) of corresponding rows (N, D); equal rows have 1, rows of zeros no direction."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    cosine = np.divide((x * y).sum(1), norms, out=np.zeros_like(norms), where=norms != 0)
    return np.where((x == y).all(axis=1), 1.0, cosine)
