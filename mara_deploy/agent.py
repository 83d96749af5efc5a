"""The accept/reject agent in PyTorch, with the parameter names of MARA's released checkpoints.

Source: MARA (arXiv 2505.19743) and its released agents (IAAR-Shanghai/MARA_AGENTS on the Hugging Face Hub).
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mara_runtime.config import FALLBACKS
from mara_runtime.errors import MaraError, first_line

WIDTHS = (1024, 256)
"""Hidden widths of the released agents."""
_REFUSED_GLOBAL = re.compile(r"GLOBAL ([\w.]+) was not an allowed global")
"""What torch says of a pickle that is more than tensors."""
UNKNOWN_FALLBACK = "first"
"""Fallback of an agent file that records none: that of the paper's evaluation."""


class AgentError(MaraError):
    """An agent file that is missing, damaged, or made for another model."""


class Agent(nn.Module):
    """LayerNorm(D) → Linear → ReLU → Linear → ReLU → Linear(·, 2); action 1 accepts.

    hidden_size: D of the LLM; widths: of the two hidden layers.
    """

    def __init__(self, hidden_size: int, widths: tuple[int, int] = WIDTHS) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(hidden_size, eps=1e-5)
        self.linear1 = nn.Linear(hidden_size, widths[0])
        self.linear2 = nn.Linear(widths[0], widths[1])
        self.output_linear = nn.Linear(widths[1], 2)
        self.fallback = UNKNOWN_FALLBACK

    @property
    def hidden_size(self) -> int:
        """D of the LLM that this agent was made for."""
        return self.linear1.in_features

    @property
    def widths(self) -> tuple[int, int]:
        """Widths of the two hidden layers."""
        return self.linear1.out_features, self.linear2.out_features

    def forward(self, states: Tensor) -> Tensor:
        """(N, D) last hidden states after the final norm → (N, 2) scores of rejecting and of accepting."""
        x = torch.relu(self.linear1(self.ln(states)))
        x = torch.relu(self.linear2(x))
        scores: Tensor = self.output_linear(x)
        return scores

    def margin(self, states: Tensor) -> Tensor:
        """(N, D) → (N,) accept score minus reject score; a candidate is accepted when this exceeds the threshold."""
        scores = self.forward(states)
        return scores[:, 1] - scores[:, 0]


def untrained(hidden_size: int, seed: int, widths: tuple[int, int] = WIDTHS) -> Agent:
    """An agent with random weights: a control, and a stand-in where none has been trained. It aligns nothing."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Agent(hidden_size, widths).eval()


def save(agent: Agent, path: Path, facts: Mapping[str, str] | None = None) -> None:
    """Write a .safetensors file that records the fallback, and what else there is to know. Raises OSError."""
    try:
        save_file(cpu_state(agent), path, metadata={**(facts or {}), "fallback": agent.fallback})
    except SafetensorError as error:  # what it makes of a full disk
        raise OSError(str(error)) from error
    mask = os.umask(0)  # safetensors makes private files; what a user makes follows their umask
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def cpu_state(agent: Agent) -> dict[str, Tensor]:
    """The state dict as the released `.pth` files hold it, on the CPU."""
    return {name: tensor.detach().cpu() for name, tensor in agent.state_dict().items()}


def load(path: Path) -> Agent:
    """Read a released `.pth` checkpoint or a `.safetensors` file; the widths follow from the shapes.

    Pickled code is never run (`weights_only=True`). Raises AgentError.
    """
    try:
        found = path.is_file()
    except (OSError, ValueError):  # no file can have such a name
        found = False
    if not found:
        raise AgentError(f"there is no agent file at {path}{_instead(path)}")
    state, metadata = _read_safetensors(path) if path.suffix.lower() == ".safetensors" else _read_pickle(path)
    for name, tensor in state.items():
        if tensor.layout is not torch.strided or tensor.is_meta or not tensor.is_floating_point():
            raise AgentError(f"{path} is not a MARA agent: {name} holds no plain floating-point numbers")
    if any(name.startswith("linear11.") for name in state):
        raise AgentError(f"{path} holds the twin critics of a training run, not an agent: give the actor's file")
    agent = Agent(*_sizes(path, state))
    expected = {name: tuple(t.shape) for name, t in agent.state_dict().items()}
    for name, tensor in state.items():
        if name not in expected or tuple(tensor.shape) != expected[name]:
            raise AgentError(f"{path} is not a MARA agent: {name} {list(tensor.shape)} does not belong in it")
    agent.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    if not all(torch.isfinite(p).all() for p in agent.parameters()):
        raise AgentError(f"{path} is damaged: it holds weights that are not finite")
    agent.fallback = metadata.get("fallback", UNKNOWN_FALLBACK)
    if agent.fallback not in FALLBACKS:
        raise AgentError(f"{path} records the fallback {agent.fallback!r}; known are {', '.join(FALLBACKS)}")
    return agent.eval()


def _instead(path: Path) -> str:
    """What to give for a path that is no file."""
    try:
        inside = sorted(p.name for p in path.iterdir() if p.suffix in (".safetensors", ".pth"))
    except (OSError, ValueError):
        inside = []
    if inside:
        found = "agent.safetensors" if "agent.safetensors" in inside else inside[0]
        return f", which is a folder that holds {found}: give --agent {path / found}"
    return ": --agent takes a .pth or .safetensors file, hub-id:file, or `demo`"


def _sizes(path: Path, state: dict[str, Tensor]) -> tuple[int, tuple[int, int]]:
    names = [
        f"{layer}.{part}" for layer in ("ln", "linear1", "linear2", "output_linear") for part in ("weight", "bias")
    ]
    missing = [name for name in names if name not in state]
    prefix = next((name.removesuffix("ln.weight") for name in state if name.endswith(".ln.weight")), "")
    if missing and prefix and all(f"{prefix}{name}" in state for name in names):
        hint = ", as DataParallel writes them: save its .module's state_dict()" if prefix == "module." else ""
        raise AgentError(
            f"{path} is not a MARA agent: its names begin with {prefix!r}{hint or ': save them without it'}"
        )
    if missing:
        raise AgentError(f"{path} is not a MARA agent: it lacks {', '.join(missing)}")
    if any(state[f"{layer}.weight"].dim() != 2 for layer in ("linear1", "linear2")):
        raise AgentError(f"{path} is not a MARA agent: its linear weights are not matrices")
    (first, hidden_size), (second, _) = state["linear1.weight"].shape, state["linear2.weight"].shape
    if not (first and second and hidden_size):
        raise AgentError(f"{path} is not a MARA agent: it has layers without a unit")
    return hidden_size, (first, second)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise AgentError(f"{path} cannot be read as safetensors: {error}") from None


def _read_pickle(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's remarks on the age of a file
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged pickles fail in every way there is
        if refused := _REFUSED_GLOBAL.search(str(error)):
            raise AgentError(
                f"{path} cannot be read as a PyTorch state dict: it is a pickled module or other object "
                f"({refused[1]}), whose code is not run: save its state_dict(), as torch.save(agent.state_dict(), file)"
            ) from None
        raise AgentError(f"{path} cannot be read as a PyTorch state dict: {_plain(error)}") from None
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise AgentError(f"{path} is not a plain state dict of tensors, as released agents are")
    return state, {}


def _plain(error: Exception) -> str:
    """What torch says, without the colours of a terminal."""
    return re.sub(r"\x1b\[[0-9;]*m", "", first_line(error))
