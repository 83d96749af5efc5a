"""A bundle's agents: read from their files, folded, stacked; what cannot be read is one line."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mara_runtime import agents, tensors
from mara_runtime.agents import AgentStack, fold, parameters, stack
from mara_runtime.bundle import Bundle
from mara_runtime.errors import BundleError, EngineError, OptionError
from tests.unit import helpers

State = dict[str, NDArray[np.float32]]


def an_agent(seed: int, hidden_size: int = 6, widths: tuple[int, int] = (5, 4)) -> State:
    """A trained agent with random parameters."""
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=s).astype(np.float32) for name, s in parameters(hidden_size, widths).items()}


def trained_margin(state: State, states: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N, D) → (N,) what the agent says in float64, layer by layer as it was trained."""
    wide = {name: array.astype(np.float64) for name, array in state.items()}
    x = normalised(states) * wide["ln.weight"] + wide["ln.bias"]
    for layer in ("linear1", "linear2"):
        x = np.maximum(x @ wide[f"{layer}.weight"].T + wide[f"{layer}.bias"], 0)
    logits = x @ wide["output_linear.weight"].T + wide["output_linear.bias"]
    return np.asarray(logits[:, 1] - logits[:, 0])


def normalised(states: NDArray[np.float64]) -> NDArray[np.float64]:
    centred = states - states.mean(axis=1, keepdims=True)
    return np.asarray(centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5))


def stacked_margins(stacked: list[NDArray[np.float32]], states: NDArray[np.float64]) -> NDArray[np.float64]:
    """(A, N) what the graph computes of the stack, in float64."""
    w1, b1, w2, b2, w3, b3 = (array.astype(np.float64) for array in stacked)
    x = np.maximum(w1 @ normalised(states).T + b1, 0)
    return np.asarray((w3 @ np.maximum(w2 @ x + b2, 0) + b3)[:, 0])


@given(st.integers(0, 2**32), st.integers(1, 9), st.tuples(st.integers(1, 9), st.integers(1, 9)))
def test_a_folded_agent_judges_as_it_was_trained(seed: int, hidden_size: int, widths: tuple[int, int]) -> None:
    state = an_agent(seed, hidden_size, widths)
    states = np.random.default_rng(seed).normal(size=(7, hidden_size)) * 3
    expected = trained_margin(state, states)
    (margins,) = stacked_margins(stack([fold(state)], hidden_size), states)
    np.testing.assert_allclose(margins, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_a_stack_has_the_tensors_of_the_graph_and_padding_changes_nothing() -> None:
    members = [fold(an_agent(i, widths=widths)) for i, widths in enumerate(((5, 4), (3, 7), (1, 1)))]
    states = np.random.default_rng(0).normal(size=(5, 6))
    alone = np.concatenate([stacked_margins(stack([member], 6), states) for member in members])
    for asked, (first, second) in ((None, (5, 7)), ((8, 9), (8, 9))):
        stacked = stack(members, 6, asked)
        sizes: dict[int | str, int] = {"A": 3, "W1": first, "W2": second}
        shapes = [tuple(sizes.get(d, d) for d in tensor.shape) for tensor in tensors.agent_weights(6)]
        assert [array.shape for array in stacked] == shapes
        assert {array.dtype for array in stacked} == {np.dtype(np.float32)}
        np.testing.assert_array_equal(stacked_margins(stacked, states), alone)  # to the last bit: zeros add nothing


def test_no_agent_is_one_that_is_zero() -> None:
    for widths, sizes in ((None, (1, 1)), ((3, 2), (3, 2))):
        stacked = stack([], 6, widths)
        assert stacked[2].shape == (1, sizes[1], sizes[0])
        assert not any(array.any() for array in stacked)


def test_an_agent_that_is_wider_than_an_engine_is_refused() -> None:
    for widths in ((4, 4), (5, 3)):
        with pytest.raises(EngineError, match=rf"\(5, 4\), and the engine was built for \({widths[0]}, {widths[1]}\)"):
            stack([fold(an_agent(0))], 6, widths)
    assert stack([fold(an_agent(0))], 6, (5, 4))[0].shape == (1, 5, 6)


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def a_bundle(folder: Path, **files: bytes) -> Bundle:
    return Bundle.open(helpers.make_bundle(folder, agents=files), verify=False)


def test_agents_come_into_memory_in_their_order_and_only_when_they_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = a_bundle(tmp_path, a=helpers.agent_file([1, 2]), b=helpers.agent_file([3, 4]))
    read, opened = agents.read_file, []
    monkeypatch.setattr(agents, "read_file", lambda path, most: opened.append(path.stem) or read(path, most))
    memory, loaded = AgentStack(bundle), list[list[NDArray[np.float32]]]()
    memory.use((), loaded.append)  # also nothing is something at first
    assert not any(array.any() for array in loaded.pop())
    for names, vectors in ((("b", "a"), [[3, 4], [1, 2]]), (("a",), [[1, 2]]), (("a", "b"), [[1, 2], [3, 4]])):
        for same in (names, list(names)):
            memory.use(same, loaded.append)
        assert memory.names == names
        assert loaded.pop()[0][:, 0].tolist() == vectors
        assert loaded == []
    memory.use((), loaded.append)
    assert len(loaded) == 1
    assert opened == ["b", "a"]  # each once: they stay in host memory
    with pytest.raises(OptionError, match="--agent is 'c'; the bundle has a, b"):
        memory.use(["c"], loaded.append)


def test_agents_whose_loading_ended_early_are_loaded_again(tmp_path: Path) -> None:
    memory, loaded = AgentStack(a_bundle(tmp_path, a=helpers.agent_file([1, 2]))), list[Any]()

    def stop(_: object) -> None:
        raise KeyboardInterrupt

    memory.use((), loaded.append)
    with pytest.raises(KeyboardInterrupt):
        memory.use(["a"], stop)
    for names in (["a"], ()):
        memory.use(names, loaded.append)
    assert len(loaded) == 3


def changed(**arrays: NDArray[np.float32] | None) -> bytes:
    """The file of an agent, arrays of it changed or left out; names have _ for a dot."""
    state = safetensors.numpy.load(helpers.agent_file([1, 2]))
    for name, array in arrays.items():
        key = name.replace("__", ".")
        state.pop(key, None)
        if array is not None:
            state[key] = array
    content: bytes = safetensors.numpy.save(state)
    return content


DAMAGE: dict[str, tuple[bytes | Callable[[Path], object], str]] = {
    "empty": (b"", "cannot be read as an agent"),
    "a pickle": (b"\x80\x02}q.", "cannot be read as an agent"),
    "cut": (helpers.agent_file([1, 2])[:-1], "cannot be read as an agent"),
    "missing": (Path.unlink, "cannot be read as an agent"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "cannot be read as an agent"),
    "too large": (lambda path: os.truncate(path, agents.MOST_BYTES + 1), "more than 268,435,456 bytes"),
    "without a second layer": (changed(linear2__weight=None), "linear2.weight' is missing"),
    "with a third layer": (changed(linear3__bias=np.zeros(2, np.float32)), "'linear3.bias' is float32 (2,)"),
    "of another hidden size": (helpers.agent_file([1, 2, 3]), "'linear1.weight' is float32 (3, 3)"),
    "of other widths": (safetensors.numpy.save(an_agent(0, 2, (5, 4))), "'linear1.bias' is float32 (5,)"),
    "a bias that is short": (changed(linear1__bias=np.zeros(1, np.float32)), "'linear1.bias' is float32 (1,)"),
    "a scalar": (changed(ln__weight=np.zeros((), np.float32)), "'ln.weight' is float32 ()"),
    "three logits": (changed(output_linear__weight=np.zeros((3, 2), np.float32)), "(3, 2)"),
    "NaN": (changed(linear2__bias=np.array([0, np.nan], np.float32)), "not finite"),
    "too great": (changed(output_linear__bias=np.array([-3e38, 3e38], np.float32)), "not finite"),
    "whole numbers": (changed(linear2__bias=np.array([1, 2], np.int64)), "'linear2.bias' is int64 (2,)"),
}
"""What an agent's file is, and what must be named beside it."""


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("what", DAMAGE)
def test_a_file_that_is_no_agent_of_the_bundle_is_named_in_one_line(tmp_path: Path, what: str) -> None:
    content, named = DAMAGE[what]
    bundle = a_bundle(tmp_path, a=helpers.agent_file([1, 2]), b=helpers.agent_file([1, 2]))
    path = tmp_path / "agents" / "b.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content(path)
    memory, loaded = AgentStack(bundle), list[Any]()
    memory.use(["a"], loaded.append)
    for _ in range(2):
        with pytest.raises(BundleError) as caught:
            memory.use(["a", "b"], loaded.append)
        message = str(caught.value)
        assert message.startswith(str(path))
        assert named in message
        assert message.endswith("add it again with mara-agent")
        assert message.isprintable()
    memory.use(["a"], loaded.append)
    assert len(loaded) == 1  # as it was
