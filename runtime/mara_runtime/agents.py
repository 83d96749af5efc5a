"""A bundle's agents, as the step graph takes them: read from their files, folded, stacked.

A file holds an agent as it was trained (`mara_deploy.agent`): LayerNorm → linear1 → ReLU → linear2 → ReLU → two
logits. The graph needs less: scale and shift of the LayerNorm go into linear1, and the two logits become their
difference, the margin. So one normalisation serves all agents of a stack.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from mara_runtime.bundle import Bundle
from mara_runtime.errors import BundleError, EngineError, first_line
from mara_runtime.files import read_file
from mara_runtime.json_reader import shortened

EPSILON = 1e-5
"""Of the LayerNorm."""
MOST_BYTES = 1 << 28
"""Of an agent's file, and of its weights in float32; those of a 70B LLM's agent take 35 MB."""
_KEPT = 8
"""Agents that stay in host memory for the next change."""

Weights = tuple[NDArray[np.float32], ...]
"""One agent's, in the order and with the shapes of `tensors.agent_weights`, without A."""


def parameters(hidden_size: int, widths: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """The parameters of a trained agent, and their shapes."""
    first, second = widths
    shapes: dict[str, tuple[int, ...]] = {"ln.weight": (hidden_size,), "ln.bias": (hidden_size,)}
    layers = {"linear1": (first, hidden_size), "linear2": (second, first), "output_linear": (2, second)}
    for layer, shape in layers.items():
        shapes |= {f"{layer}.weight": shape, f"{layer}.bias": shape[:1]}
    return shapes


def fold(state: Mapping[str, NDArray[np.float32]]) -> Weights:
    """The weights of a trained agent by parameter name → those that the graph takes; computed in float64."""
    wide = {name: array.astype(np.float64) for name, array in state.items()}
    first, output = wide["linear1.weight"], wide["output_linear.weight"]
    folded = (
        first * wide["ln.weight"],
        (wide["linear1.bias"] + first @ wide["ln.bias"])[:, None],
        wide["linear2.weight"],
        wide["linear2.bias"][:, None],
        (output[1] - output[0])[None],
        (wide["output_linear.bias"][1] - wide["output_linear.bias"][0])[None, None],
    )
    with np.errstate(over="ignore"):
        return tuple(array.astype(np.float32) for array in folded)


def stack(
    agents: Sequence[Weights], hidden_size: int, widths: tuple[int, int] | None = None
) -> list[NDArray[np.float32]]:
    """Weights of several agents as `tensors.agent_weights` has them; narrower ones are padded with zeros.

    widths: default those of the widest. No agent at all is one that is zero. Raises EngineError for one that is wider.
    """
    found = [(len(weights[1]), len(weights[3])) for weights in agents]
    most = widths or (max((w for w, _ in found), default=1), max((w for _, w in found), default=1))
    for each in found:
        if each[0] > most[0] or each[1] > most[1]:
            raise EngineError(f"an agent has hidden widths {each}, and the engine was built for {most}: build it again")
    count, (first, second) = max(len(agents), 1), most
    sizes = (first, hidden_size), (first, 1), (second, first), (second, 1), (1, second), (1, 1)
    stacked = [np.zeros((count, *size), np.float32) for size in sizes]
    for i, weights in enumerate(agents):
        for target, source in zip(stacked, weights, strict=True):
            target[i, : source.shape[0], : source.shape[1]] = source
    return stacked


class AgentStack:
    """The agents that an engine has in memory, by name, and where a pass's mix refers to them."""

    def __init__(self, bundle: Bundle, widths: tuple[int, int] | None = None) -> None:
        """widths: of all stacks; default those of the widest agent in a stack."""
        self._bundle, self._widths = bundle, widths
        self._read = lru_cache(maxsize=_KEPT)(self._weights)
        self.names: tuple[str, ...] | None = None
        """None: none was loaded, or not to the end"""

    def use(self, names: Sequence[str], load: Callable[[list[NDArray[np.float32]]], None]) -> None:
        """Stack agents by name and `load` them, if they are not in memory. Raises BundleError, EngineError."""
        if self.names == tuple(names):
            return
        hidden_size = self._bundle.manifest.model.shape.hidden_size
        stacked = stack([self._read(name) for name in names], hidden_size, self._widths)
        self.names = None  # it may be interrupted
        load(stacked)
        self.names = tuple(names)

    def _weights(self, name: str) -> Weights:
        facts = self._bundle.manifest.agent(name)
        path = self._bundle.path(facts.file)
        try:
            state = _load(read_file(path, MOST_BYTES))
        except (OSError, ValueError) as error:
            raise BundleError(
                f"{path} cannot be read as an agent ({first_line(error)}): add it again with mara-agent"
            ) from None
        expected = parameters(facts.hidden_size, facts.widths)
        for name in sorted(state.keys() | expected.keys()):
            found = f"{state[name].dtype} {state[name].shape}" if name in state else "missing"
            if name not in expected or found != f"float32 {expected[name]}":
                raise BundleError(
                    f"{path} is not the agent that the manifest describes: {shortened(name)} is {found}: "
                    "add it again with mara-agent"
                )
        weights = fold(state)
        if not all(np.isfinite(array).all() for array in weights):
            raise BundleError(f"{path} has weights that are not finite: add it again with mara-agent")
        return weights


class EachAgent:
    """Agents of a bundle by themselves, on the host: the margin of each, of which a pass knows the mixed sum alone.

    Float32, like the graph's; sums over them agree with its margins up to the last bits. Raises BundleError.
    """

    def __init__(self, bundle: Bundle, names: Sequence[str]) -> None:
        self.names = tuple(names)
        AgentStack(bundle).use(self.names, self._take)

    def _take(self, stacked: list[NDArray[np.float32]]) -> None:
        self._weights = stacked

    def margins(self, rows: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        """R hidden states (D,) → (A, R) margins, before the mix."""
        first, first_bias, second, second_bias, output, output_bias = self._weights
        states = np.stack(rows)
        centred = states - states.mean(axis=1, keepdims=True)
        normal = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + np.float32(EPSILON))
        wide = np.maximum(first @ normal.T + first_bias, 0)  # (A, W1, R)
        narrow = np.maximum(second @ wide + second_bias, 0)  # (A, W2, R)
        margins: NDArray[np.float32] = (output @ narrow + output_bias)[:, 0]
        return margins


def _load(content: bytes) -> dict[str, NDArray[np.float32]]:
    """The tensors of a safetensors file. Raises ValueError."""
    import safetensors.numpy
    from safetensors import SafetensorError

    try:
        tensors: dict[str, NDArray[np.float32]] = safetensors.numpy.load(content)
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(error) from None
    return tensors
