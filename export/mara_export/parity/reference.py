"""The reference of the parity gate: Hugging Face eager, float32."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from mara_export.errors import ModelError
from mara_export.parity.rows import F32, NAMES, SIBLINGS, Case, Rows, Side
from mara_export.progress import Progress
from mara_runtime.errors import first_line

if TYPE_CHECKING:  # this module is imported on devices without torch, too
    import torch

TEXTS = (
    "How do I keep bread fresh for a week without a freezer? I live in a damp flat near the sea, I bake one large loaf "
    "of rye on Sundays, and by Thursday there is mould on the crust. I have tried a paper bag, a wooden box and a "
    "clean towel, and none of them helped for more than a day or two.",
    "The keeper of the lighthouse was afraid of the dark. Every evening, an hour before sunset, he climbed the hundred "
    "and forty steps, lit the great lamp and sat down beside it with a book, his back to the window. Ships thought "
    "that he watched over them; in truth it was the light that watched over him.",
    "def area(corners: list[tuple[float, float]]) -> float:\n"
    "    # of a polygon, whichever way its corners go round\n"
    "    total = 0.0\n"
    "    for (x1, y1), (x2, y2) in zip(corners, corners[1:] + corners[:1]):\n"
    "        total += x1 * y2 - x2 * y1\n"
    "    return abs(total) / 2\n",
)
"""Prompts of a model that has a tokenizer, from their beginning."""
PROMPTS = 4
"""Prompts in all; those that are not texts are random tokens."""
PROMPT_TOKENS = 48
FORWARDS = 5
"""Of the model, for prompts of one length."""

_SIDES = ("rows", "recomputed")
"""Of a `Side`; nothing is perturbed here."""

Prompt = tuple[list[int], bool]
"""Token ids, and whether they are text."""


class Margins(Protocol):
    """An agent in PyTorch."""

    def margin(self, states: torch.Tensor) -> torch.Tensor:
        """(N, D) → (N,)."""


@dataclass(frozen=True)
class Reference:
    """Everything that the gate compares an engine with."""

    cases: list[Case]
    largest_activation: float
    """absolute value, over inputs and outputs of all modules of the model"""

    def taken_apart(self) -> tuple[Any, dict[str, F32]]:
        """What JSON can hold of it, and its arrays by name."""
        cases = [[case.tokens, case.siblings, case.is_text] for case in self.cases]
        arrays = {
            f"{i}.{side}.{name}": getattr(getattr(case.reference, side), name)
            for i, case in enumerate(self.cases)
            for side in _SIDES
            for name in NAMES
        }
        return {"cases": cases, "largest_activation": self.largest_activation}, arrays

    @staticmethod
    def put_together(facts: Any, arrays: Mapping[str, F32]) -> Reference:
        """The reference that was taken apart."""

        def rows(i: int, side: str) -> Rows:
            return Rows(*(arrays[f"{i}.{side}.{name}"] for name in NAMES))

        cases = [
            Case(tokens, siblings, Side(*(rows(i, side) for side in _SIDES)), is_text)
            for i, (tokens, siblings, is_text) in enumerate(facts["cases"])
        ]
        return Reference(cases, facts["largest_activation"])


def prompts(name: str, tokenizer: Any | None, vocab_size: int, context: int) -> list[Prompt]:
    """Prompts of one length that leave room for a sibling in `context` tokens.

    name: of the model, for messages. Raises ModelError for a tokenizer that does not fit the vocabulary.
    """
    import torch

    count = min(PROMPT_TOKENS, context - 1)
    texts = [] if tokenizer is None else [tokenizer(text)["input_ids"] for text in TEXTS]
    found = [((ids * count)[:count], True) for ids in texts if ids]
    largest = max((max(ids) for ids, _ in found), default=0)
    if largest >= vocab_size:
        raise ModelError(
            f"{name}: its tokenizer produces id {largest}, but its vocabulary ends at {vocab_size - 1}: use the "
            "tokenizer that belongs to the model"
        )
    generator = torch.Generator().manual_seed(0)
    while len(found) < PROMPTS:
        found.append((torch.randint(vocab_size, (count,), generator=generator).tolist(), False))
    return found


def run_reference(
    model: Any,
    name: str,
    agents: Sequence[Margins],
    inputs: Sequence[Prompt],
    max_candidates: int,
    progress: Progress,
) -> Reference:
    """Run a causal LM (eval mode, float32, eager attention) and the agents over the prompts.

    name: of the model, for messages. Raises ModelError where that fails or gives values that are not finite.
    """
    with _largest_activation(model) as largest, _shown(model, inputs, progress):
        try:
            cases = run_cases(model, agents, inputs, max_candidates)
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:  # of a model that loads
            raise ModelError(f"{name} cannot be run by transformers: {first_line(error)}") from error
    rows = [case.reference.rows for case in cases]
    if not all(np.isfinite(r.hidden).all() and np.isfinite(r.logits).all() for r in rows):
        raise ModelError(f"{name} produces values that are not finite in transformers, too: its weights are damaged")
    if not all(np.isfinite(r.margins).all() for r in rows):
        raise ModelError(f"an agent produces margins that are not finite on {name}: its weights are damaged")
    return Reference(cases, largest())


def run_cases(
    model: Any, agents: Sequence[Margins], inputs: Sequence[Prompt], max_siblings: int = SIBLINGS
) -> list[Case]:
    """Run prompts and the best next tokens of each. Prompts of one length share FORWARDS forwards."""
    cases: dict[int, Case] = {}
    for indices in _by_length(inputs):
        found = _run_batch(model, agents, [inputs[index] for index in indices], max_siblings)
        cases.update(zip(indices, found, strict=True))
    return [cases[index] for index in range(len(inputs))]


def _by_length(inputs: Sequence[Prompt]) -> list[list[int]]:
    indices: dict[int, list[int]] = {}
    for index, (tokens, _) in enumerate(inputs):
        indices.setdefault(len(tokens), []).append(index)
    return [*indices.values()]


def _run_batch(model: Any, agents: Sequence[Margins], inputs: Sequence[Prompt], max_siblings: int) -> list[Case]:
    """Run prompts of one length, then the siblings of each; and again in halves, the siblings in reverse."""
    import torch

    @torch.no_grad()
    def run(ids: torch.Tensor, cache: Any = None) -> tuple[tuple[torch.Tensor, torch.Tensor], Any]:
        out = model(input_ids=ids, past_key_values=cache, use_cache=True, output_hidden_states=True)
        return (out.hidden_states[-1], out.logits), out.past_key_values

    def follow(cache: Any, siblings: torch.Tensor) -> list[torch.Tensor]:
        """Results (B, K, …) of siblings (B, K), each behind its prompt alone."""
        cache.batch_repeat_interleave(siblings.shape[1])
        return [each.reshape(*siblings.shape, -1) for each in run(siblings.reshape(-1, 1), cache)[0]]

    def rows(*parts: Sequence[torch.Tensor]) -> list[Rows]:
        """Results (B, S, …) of consecutive rows → all rows of each prompt."""
        together = [torch.cat(part, dim=1) for part in zip(*parts, strict=True)]
        return [Rows(h.numpy(), z.numpy(), margins_of(agents, h)) for h, z in zip(*together, strict=True)]

    ids = torch.tensor([tokens for tokens, _ in inputs])
    prompt, cache = run(ids)
    best = torch.topk(prompt[1][:, -1], min(SIBLINGS, max_siblings, prompt[1].shape[-1])).indices
    straight = rows(prompt, follow(cache, best))
    parts, cache = [], None
    for half in ids.tensor_split(2, dim=1):
        if half.shape[1]:
            part, cache = run(half, cache)
            parts.append(part)
    again = rows(*parts, [each.flip(1) for each in follow(cache, best.flip(1))])
    return [
        Case(ids[i].tolist(), best[i].tolist(), Side(straight[i], again[i]), is_text)
        for i, (_, is_text) in enumerate(inputs)
    ]


def margins_of(agents: Sequence[Margins], hidden: torch.Tensor) -> F32:
    """(N, D) hidden states → (N, K) margins of K agents in PyTorch."""
    import torch

    with torch.no_grad():
        margins = [agent.margin(hidden).numpy() for agent in agents]
    return np.stack(margins, axis=1) if margins else np.zeros((len(hidden), 0), np.float32)


@contextlib.contextmanager
def _largest_activation(model: torch.nn.Module) -> Iterator[Callable[[], float]]:
    """Yield a function that returns the largest absolute value so far that a module took or returned."""
    import torch

    largest = 0.0

    def look(module: torch.nn.Module, inputs: tuple[Any, ...], outputs: Any) -> None:
        nonlocal largest
        for value in (*inputs, *(outputs if isinstance(outputs, tuple) else (outputs,))):
            if isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel():
                largest = max(largest, float(value.detach().abs().max()))

    hooks = [module.register_forward_hook(look) for module in {*_leaves(model)}]
    try:
        yield lambda: largest
    finally:
        for hook in hooks:
            hook.remove()


def _leaves(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Matrices, norms, the embedding; what lies between them is an input of the next. An adapted matrix is one."""
    parts = () if hasattr(module, "base_layer") else [*module.children()]
    for part in parts:
        yield from _leaves(part)
    if not parts:
        yield module


@contextlib.contextmanager
def _shown(model: Any, inputs: Sequence[Prompt], progress: Progress) -> Iterator[None]:
    """Show how far the forwards over `inputs` are, by layers: a large model takes a minute for each."""
    layers = getattr(model.get_decoder(), "layers", ())
    total, done = FORWARDS * len(_by_length(inputs)) * len(layers), 0
    with progress.phases() as move:

        def look(*_: Any) -> None:
            nonlocal done
            done += 1
            move("layers", done, total)

        hooks = [layer.register_forward_hook(look) for layer in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
