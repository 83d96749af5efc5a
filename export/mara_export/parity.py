"""The parity gate: does the exported bundle compute what Hugging Face eager computes?

Teacher-forced over several prompts and over sibling candidates, in the engine that will run the bundle. A bundle
that fails is not written. Two kinds of evidence are asked for:

numbers     hidden states, logits, margins: largest difference relative to the largest value, cosine of rows
outcomes    ranks of the next tokens, and the agent's decisions, wherever the reference's own gap exceeds the noise

The noise is measured without comparing the two sides, else the second check could not fail: it is how much each
side alone moves when the same rows are computed by another route. The reference: the siblings as a batch against one
at a time. The engine: prompt and siblings in a pass each against everything one row at a time, so that the entries of
the cache come by the other route, too.

What a bundle records for decoding is more, with int8 and int4: their kernels round activations to 255 levels. A last
bit rarely tips one, and then moves a row a thousand times as far. Whether that happens in the few rows of the gate is
chance, and on processors whose kernels add alike at every width it does not. So a third route disturbs the cache until
a level tips in nearly every row. It excuses nothing: the gate's own noise stays that of the two.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mara_runtime.engines.base import Engine, Pass
from mara_runtime.manifest import Noise

if TYPE_CHECKING:  # only the reference needs it, and two engines are compared on devices that have none
    import torch

    from mara_runtime.engines.ort import CpuEngine

F32 = NDArray[np.float32]
NAMES = ("hidden", "logits", "margins")
"""What is compared of a row; attributes of `Rows`."""

TEXTS = (
    "How do I keep bread fresh for a week without a freezer?",
    "Write two sentences about a lighthouse keeper who is afraid of the dark.",
    "def area(width: float, height: float) -> float:\n    return",
)
"""Prompts of a model that has a tokenizer."""
PROMPTS = 4
"""Prompts in all; those that are not texts are random tokens."""
PROMPT_TOKENS = 48
SIBLINGS = 8
MOST_FLOAT16 = float(np.finfo(np.float16).max)
RANKS = 40
NOISE_FLOOR = 1e-5
"""Least noise, relative to the reference's largest value: float32 sums of thousands of terms err by about a tenth of
it, and two routes through the same kernels may happen to agree to the last bit."""
NOISE_FACTOR = 4.0
"""Gaps below this many times the measured noise are not held against the export: two sides err independently, and
the noise is a maximum over fewer rows than are compared."""
DISTURBANCE = 1e-4
"""Standard deviation, relative, of what `disturber` does to entries of the cache. A level of int8 is 8e-3 of the
largest activation of its block: a hundredth of this tips none in most rows, and this by itself moves the numbers by far
less than a tipped level does."""
DISTURBED_ROWS = 8
"""Rows of a pass of the third route; those of later passes see the disturbed entries of earlier ones."""


@dataclass(frozen=True)
class Gate:
    """What an export of one precision has to reach."""

    least_cosine: float
    greatest_difference: float
    """relative to the largest value of the reference"""
    differing: float = 0.0
    """share of the compared outcomes (best tokens, decisions) that may differ"""
    lead: float = 0.0
    """nats; a best token that leads by less is not compared, as rounding the weights may rightly overturn it"""
    all_ranks: bool = False
    """the RANKS best tokens must agree in order, too, not only the first"""


GATES = {
    "fp32": Gate(least_cosine=0.99999, greatest_difference=1e-4, all_ranks=True),
    "fp16": Gate(least_cosine=0.9999, greatest_difference=2e-2, differing=0.02, lead=0.05),
    "bf16": Gate(least_cosine=0.999, greatest_difference=0.1, differing=0.05, lead=0.2),
    "int8": Gate(least_cosine=0.99, greatest_difference=0.2, differing=0.05, lead=0.25),
    "int4": Gate(least_cosine=0.7, greatest_difference=1.0, differing=0.2, lead=1.0),
}
"""By precision. Below fp32 they are wide, as random and tiny models lose more to rounding than trained and large ones:
they catch a broken export, and the report says what was lost."""


class Margins(Protocol):
    """The agent in PyTorch."""

    def margin(self, states: torch.Tensor) -> torch.Tensor:
        """(N, D) → (N,)."""


@dataclass(frozen=True)
class Rows:
    """What was computed for N token rows."""

    hidden: F32
    """(N, D)"""
    logits: F32
    """(N, V)"""
    margins: F32
    """(N,)"""

    def tail(self, count: int) -> Rows:
        """The last `count` rows."""
        return Rows(self.hidden[-count:], self.logits[-count:], self.margins[-count:])

    @staticmethod
    def join(parts: Sequence[Rows]) -> Rows:
        """All rows of several."""
        return Rows(*(np.concatenate([getattr(part, name) for part in parts]) for name in NAMES))


@dataclass(frozen=True)
class Side:
    """One prompt on one side: each position of the prompt, then each sibling after it."""

    rows: Rows
    """T + K rows"""
    again: Rows
    """the last of them, at least the siblings, by the other route"""
    disturbed: Rows | None = None
    """all of them by the third route; None where nothing rounds activations"""

    def noise(self, name: str) -> float:
        """How much values move between the two routes."""
        return _difference(getattr(self.rows.tail(len(self.again.margins)), name), getattr(self.again, name))

    def tipped(self, name: str) -> float:
        """How much values move when levels tip."""
        return 0.0 if self.disturbed is None else _difference(getattr(self.rows, name), getattr(self.disturbed, name))


@dataclass(frozen=True)
class Case:
    """One prompt with the reference's answers."""

    tokens: list[int]
    siblings: list[int]
    reference: Side
    is_text: bool = True
    """False: random tokens, of which no model makes anything"""


def reference_case(
    model: Any, agent: Margins, tokens: Sequence[int], max_siblings: int = SIBLINGS, is_text: bool = True
) -> Case:
    """Run Hugging Face eager over a prompt. model: a causal LM in eval mode, float32, with eager attention."""
    import torch

    @torch.no_grad()
    def run(ids: list[list[int]], cache: Any = None) -> tuple[torch.Tensor, torch.Tensor, Any]:
        out = model(input_ids=torch.tensor(ids), past_key_values=cache, use_cache=True, output_hidden_states=True)
        return out.hidden_states[-1], out.logits, out.past_key_values

    @torch.no_grad()
    def rows(hidden: torch.Tensor, logits: torch.Tensor) -> Rows:
        return Rows(hidden.numpy(), logits.numpy(), agent.margin(hidden).numpy())

    tokens = [int(token) for token in tokens]
    hidden, logits, cache = run([tokens])
    siblings = torch.topk(logits[0, -1], min(SIBLINGS, max_siblings, logits.shape[-1])).indices.tolist()
    parts = [rows(hidden[0], logits[0])]
    for token in siblings:  # a copy each: a shared cache would let later siblings see earlier ones
        hidden, logits, _ = run([[token]], copy.deepcopy(cache))
        parts.append(rows(hidden[0], logits[0]))
    cache.batch_repeat_interleave(len(siblings))
    hidden, logits, _ = run([[token] for token in siblings], cache)
    return Case(tokens, siblings, Side(Rows.join(parts), rows(hidden[:, 0], logits[:, 0])), is_text)


@contextlib.contextmanager
def watched(model: torch.nn.Module) -> Iterator[Callable[[], float]]:
    """Tells the largest number so far that a module of the model took or gave."""
    import torch

    largest = 0.0

    def look(module: torch.nn.Module, taken: tuple[Any, ...], given: Any) -> None:
        nonlocal largest
        for value in (*taken, *(given if isinstance(given, tuple) else (given,))):
            if isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel():
                largest = max(largest, float(value.detach().abs().max()))

    # those without modules of their own: matrices, norms, the embedding; what lies between is taken by the next
    hooks = [module.register_forward_hook(look) for module in model.modules() if not [*module.children()]]
    try:
        yield lambda: largest
    finally:
        for hook in hooks:
            hook.remove()


def disturber(engine: CpuEngine) -> Callable[[int], None]:
    """Something that disturbs the entries of a slot of the KV cache, by the same random numbers in every export."""
    generator = np.random.default_rng(0)

    def disturb(slot: int) -> None:
        entries = engine.memory.entries[:, :, :, slot]
        entries[...] = entries * (1 + DISTURBANCE * generator.standard_normal(entries.shape, np.float32))

    return disturb


def engine_side(engine: Engine, case: Case, disturb: Callable[[int], None] | None = None) -> Side:
    """Run the engine over a case. disturb: disturbs a slot of the cache; None: nothing rounds activations."""

    def rows(tokens: Sequence[int], positions: Sequence[int], slot: int) -> Rows:
        out = engine.run(Pass.full_outputs(tokens, positions, slot))
        assert out.hidden is not None
        assert out.logits is not None
        return Rows(out.hidden.copy(), out.logits.copy(), out.margins.copy())

    def siblings() -> Rows:
        return rows(case.siblings, [length] * len(case.siblings), length)

    length = len(case.tokens)
    straight = Rows.join([rows(case.tokens, range(length), 0), siblings()])
    one_by_one = [rows([token], [i], i) for i, token in enumerate(case.tokens)]
    one_by_one += [rows([token], [length], length + i) for i, token in enumerate(case.siblings)]
    if disturb is None:
        return Side(straight, Rows.join(one_by_one))

    disturbed = []
    for start in range(0, length, DISTURBED_ROWS):
        slots = range(start, min(start + DISTURBED_ROWS, length))
        disturbed.append(rows(case.tokens[slots.start : slots.stop], slots, start))
        for slot in slots:
            disturb(slot)
    return Side(straight, Rows.join(one_by_one), Rows.join([*disturbed, siblings()]))


@dataclass(frozen=True)
class Report:
    """StepOutput of the gate, as it goes into the manifest and onto the screen."""

    prompts: int
    rows: int
    numbers: dict[str, dict[str, float]]
    """of each of NAMES: greatest difference relative to the largest value; of hidden states and logits least cosine"""
    noise: dict[str, float]
    """of each of NAMES, NOISE_FACTOR and NOISE_FLOOR applied"""
    engine_noise: Noise
    """for the manifest: that, and more where levels tip"""
    outcomes: dict[str, dict[str, int]]
    """of the best token, of the RANKS best, and of decisions: compared, not compared (`within_noise`), differing among
    those compared, and changed: differing among all"""
    beyond: dict[str, float]
    """of the same, nats: what is compared has a gap of more than this: the noise, or the gate's lead if it is more"""
    perplexity: dict[str, float] | None
    """of the texts among the prompts: reference, exported; None when there are none, or no number holds it"""
    failures: list[str]
    largest_activation: float | None = None
    """that the reference met; None where the engine has float32's range"""

    def to_json(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "passed": not self.failures,
            "prompts": self.prompts,
            "rows": self.rows,
            **self.numbers,
            "noise": self.noise,
            **self.outcomes,
            "beyond": self.beyond,
            "perplexity": self.perplexity,
            "largest_activation": self.largest_activation,
        }


def compare(
    cases: Sequence[Case], found: Sequence[Side], gate: Gate, largest_activation: float | None = None
) -> Report:
    """Hold the engine's answers against the reference's.

    largest_activation: of the reference, where float16 has to hold it: a CPU, which computes in float32, does not show
    what a GPU would make of it.
    """
    pairs = [(case.reference, side) for case, side in zip(cases, found, strict=True)]
    failures = []
    if largest_activation is not None and largest_activation > MOST_FLOAT16:
        failures.append(
            f"activations reach {largest_activation:,.0f}, and float16 holds {MOST_FLOAT16:,.0f} at most: "
            "take bf16 or fp32"
        )

    numbers = {}
    for name in NAMES:
        # both routes of the engine: each of them is used to decode
        values = [(getattr(a.rows, name), getattr(b.rows, name)) for a, b in pairs]
        values += [(getattr(a.rows.tail(len(b.again.margins)), name), getattr(b.again, name)) for a, b in pairs]
        largest = np.max([np.abs(a).max() for a, _ in values])
        difference = float(np.max([_difference(a, b) for a, b in values]) / (largest or 1.0))
        numbers[name] = {"greatest_difference": difference}
        if not difference <= gate.greatest_difference:  # so written that NaN fails; numpy's max and min pass it on
            failures.append(f"{name}: greatest difference {difference:.1e}, the gate is {gate.greatest_difference}")
        if name != "margins":  # one number a row has no direction
            cosine = float(np.min([_least_cosine(a, b) for a, b in values]))
            numbers[name]["least_cosine"] = cosine
            if not cosine >= gate.least_cosine:
                failures.append(f"{name}: least cosine {cosine:.7f}, the gate is {gate.least_cosine}")

    noise = {}
    for name in NAMES:
        floor = NOISE_FLOOR * max(float(np.abs(getattr(a.rows, name)).max()) for a, _ in pairs)
        moved = NOISE_FACTOR * float(np.max([side.noise(name) for pair in pairs for side in pair]))
        noise[name] = float(np.maximum(moved, floor))
        if not np.isfinite(noise[name]):
            failures.append(f"{name}: not finite by one of two routes")
    tipped = {}
    for name in ("margins", "logits"):
        tipped[name] = NOISE_FACTOR * float(np.max([side.tipped(name) for _, side in pairs]))
        if not np.isfinite(tipped[name]):
            failures.append(f"{name}: not finite by the third route")
    beyond = {
        "first": max(noise["logits"], gate.lead),
        "ranks": noise["logits"],
        "decisions": noise["margins"],
    }
    outcomes = {
        "first": _total(compare_ranks(a.rows.logits, b.rows.logits, beyond["first"], 1) for a, b in pairs),
        "ranks": _total(compare_ranks(a.rows.logits, b.rows.logits, beyond["ranks"]) for a, b in pairs),
        "decisions": _total(compare_decisions(a.rows.margins, b.rows.margins, beyond["decisions"]) for a, b in pairs),
    }
    for name, counts in outcomes.items():
        if (name != "ranks" or gate.all_ranks) and counts["differing"] > gate.differing * counts["compared"]:
            failures.append(
                f"{name}: {counts['differing']} of {counts['compared']} that are clear by more than {beyond[name]:.2g} "
                "nats differ"
            )
    texts = [i for i, case in enumerate(cases) if case.is_text and len(case.tokens) > 1]
    perplexity = {
        "reference": _perplexity([(cases[i].tokens, pairs[i][0].rows.logits) for i in texts]),
        "exported": _perplexity([(cases[i].tokens, pairs[i][1].rows.logits) for i in texts]),
    }
    return Report(
        prompts=len(cases),
        rows=sum(len(a.rows.margins) for a, _ in pairs),
        numbers=numbers,
        noise=noise,
        engine_noise=Noise(**{name: max(noise[name], tipped[name]) for name in tipped}),
        outcomes=outcomes,
        beyond=beyond,
        perplexity=perplexity if texts and all(map(np.isfinite, perplexity.values())) else None,
        failures=failures,
        largest_activation=largest_activation,
    )


def _perplexity(texts: Sequence[tuple[Sequence[int], F32]]) -> float:
    """exp of the mean negative log-likelihood of the tokens of texts: T tokens, and logits (≥ T, V) after each."""
    losses = []
    for tokens, rows in texts:
        x = rows[: len(tokens) - 1].astype(np.float64)
        greatest = x.max(axis=1)
        total = np.log(np.exp(x - greatest[:, None]).sum(axis=1)) + greatest
        losses += (total - x[np.arange(len(x)), list(tokens[1:])]).tolist()
    with np.errstate(over="ignore"):
        return float(np.exp(np.mean(losses))) if losses else 1.0


Counts = dict[str, int]


def compare_ranks(reference: F32, found: F32, noise: float, ranks: int = RANKS) -> Counts:
    """Of the best tokens of each row (N, V), `ranks` of them: is the token of each rank the same?

    A rank counts as compared when the reference's logit there is further than `noise` from both its neighbours.
    """
    count = min(ranks, reference.shape[1] - 1)
    order = np.argsort(-reference, axis=1, kind="stable")[:, : count + 1]
    ranked = np.take_along_axis(reference, order, axis=1)
    gaps = np.pad(ranked[:, :-1] - ranked[:, 1:], ((0, 0), (1, 0)), constant_values=np.inf)  # to the better one
    clear = np.minimum(gaps[:, :-1], gaps[:, 1:]) > noise
    differing = order[:, :count] != np.argsort(-found, axis=1, kind="stable")[:, :count]
    return _counts(clear, differing)


def compare_decisions(reference: F32, found: F32, noise: float) -> Counts:
    """Are the same of N margins accepted? Compared where the reference's margin is further than `noise` from 0."""
    return _counts(np.abs(reference) > noise, (reference > 0) != (found > 0))


def _counts(clear: NDArray[np.bool_], differing: NDArray[np.bool_]) -> Counts:
    return {
        "compared": int(clear.sum()),
        "within_noise": int((~clear).sum()),
        "differing": int((clear & differing).sum()),
        "changed": int(differing.sum()),
    }


def _total(parts: Any) -> Counts:
    total: Counts = {}
    for part in parts:
        for name, count in part.items():
            total[name] = total.get(name, 0) + count
    return total


def _difference(a: F32, b: F32) -> float:
    return float(np.abs(a - b).max())


def _least_cosine(a: F32, b: F32) -> float:
    x, y = a.astype(np.float64), b.astype(np.float64)
    both = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    cosine = np.divide((x * y).sum(1), both, out=np.zeros_like(both), where=both != 0)
    return float(np.where((x == y).all(axis=1), 1.0, cosine).min())  # rows of zeros have no direction
