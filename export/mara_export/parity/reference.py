"""The reference of the parity gate: Hugging Face eager, float32."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from mara_export.errors import ModelError
from mara_export.parity.rows import F32, SIBLINGS, Case, Rows, Side
from mara_export.progress import Progress
from mara_runtime.errors import first_line

if TYPE_CHECKING:  # this module is imported on devices without torch, too
    import torch

TEXTS = (
    "How do I keep bread fresh for a week without a freezer?",
    "Write two sentences about a lighthouse keeper who is afraid of the dark.",
    "def area(width: float, height: float) -> float:\n    return",
)
"""Prompts of a model that has a tokenizer."""
PROMPTS = 4
"""Prompts in all; those that are not texts are random tokens."""
PROMPT_TOKENS = 48

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


def prompts(name: str, tokenizer: Any | None, vocab_size: int, context: int) -> list[Prompt]:
    """Prompts that leave room for a sibling in `context` tokens.

    name: of the model, for messages. Raises ModelError for a tokenizer that does not fit the vocabulary.
    """
    import torch

    count = min(PROMPT_TOKENS, context - 1)
    texts = [] if tokenizer is None else [tokenizer(text)["input_ids"][:count] for text in TEXTS]
    found = [(ids, True) for ids in texts if ids]
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
    with _largest_activation(model) as largest:
        try:
            cases = [run_case(model, agents, ids, max_candidates, is_text) for ids, is_text in progress.parts(inputs)]
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:  # of a model that loads
            raise ModelError(f"{name} cannot be run by transformers: {first_line(error)}") from error
    rows = [case.reference.rows for case in cases]
    if not all(np.isfinite(r.hidden).all() and np.isfinite(r.logits).all() for r in rows):
        raise ModelError(f"{name} produces values that are not finite in transformers, too: its weights are damaged")
    if not all(np.isfinite(r.margins).all() for r in rows):
        raise ModelError(f"an agent produces margins that are not finite on {name}: its weights are damaged")
    return Reference(cases, largest())


def run_case(
    model: Any, agents: Sequence[Margins], tokens: Sequence[int], max_siblings: int = SIBLINGS, is_text: bool = True
) -> Case:
    """Run one prompt and its best next tokens."""
    import torch

    @torch.no_grad()
    def run(ids: list[list[int]], cache: Any = None) -> tuple[torch.Tensor, torch.Tensor, Any]:
        out = model(input_ids=torch.tensor(ids), past_key_values=cache, use_cache=True, output_hidden_states=True)
        return out.hidden_states[-1], out.logits, out.past_key_values

    @torch.no_grad()
    def rows(hidden: torch.Tensor, logits: torch.Tensor) -> Rows:
        return Rows(hidden.numpy(), logits.numpy(), margins_of(agents, hidden))

    tokens = [int(token) for token in tokens]
    hidden, logits, cache = run([tokens])
    siblings = torch.topk(logits[0, -1], min(SIBLINGS, max_siblings, logits.shape[-1])).indices.tolist()
    parts = [rows(hidden[0], logits[0])]
    for token in siblings:  # a copy each: a shared cache would let later siblings see earlier ones
        hidden, logits, _ = run([[token]], copy.deepcopy(cache))
        parts.append(rows(hidden[0], logits[0]))
    cache.batch_repeat_interleave(len(siblings))
    hidden, logits, _ = run([[token] for token in siblings], cache)
    return Case(tokens, siblings, Side(Rows.concatenate(parts), rows(hidden[:, 0], logits[:, 0])), is_text)


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

    # leaf modules: matrices, norms, the embedding; what lies between them is an input of the next
    hooks = [module.register_forward_hook(look) for module in model.modules() if not [*module.children()]]
    try:
        yield lambda: largest
    finally:
        for hook in hooks:
            hook.remove()
