"""The accept/reject agent in PyTorch, with the parameter names of MARA's released checkpoints.

Source: MARA (arXiv 2505.19743) and its released agents (IAAR-Shanghai/MARA_AGENTS on the Hugging Face Hub).
"""

from __future__ import annotations

import json
import re
import warnings
import zipfile
from dataclasses import asdict
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mara_runtime.agents import EPSILON, MOST_BYTES
from mara_runtime.config import FALLBACKS
from mara_runtime.errors import BundleError, MaraError, first_line
from mara_runtime.files import write_atomic
from mara_runtime.json_reader import JsonReader, load_object
from mara_runtime.tensors import AGENT_WIDTHS
from mara_runtime.training import Training

METADATA = "mara"
"""Key of the one JSON text in a .safetensors file's metadata: {"fallback": …, "training": {…} or null}."""
_MAKES_BYTES = (b"bytearray", b"_codecs")
"""What torch.load would call in a pickle, and what could make any amount of bytes."""
DEFAULT_FALLBACK = "first"
"""Fallback of an agent file that does not record one, as in the paper's evaluation."""
_LAYERS = ("ln", "linear1", "linear2", "output_linear")
_PARAMETERS = tuple(f"{layer}.{part}" for layer in _LAYERS for part in ("weight", "bias"))
_DISALLOWED_GLOBAL = re.compile(r"GLOBAL ([\w.]+) was not an allowed global")
"""Part of torch's error for a pickle that contains more than tensors."""
_ANSI_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class AgentError(MaraError):
    """An agent file that is missing, damaged, or not an agent."""


class Agent(nn.Module):
    """LayerNorm(D) → Linear → ReLU → Linear → ReLU → Linear(·, 2); action 1 accepts.

    hidden_size: D of the LLM; widths: sizes of the two hidden layers.
    """

    def __init__(self, hidden_size: int, widths: tuple[int, int] = AGENT_WIDTHS) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(hidden_size, eps=EPSILON)
        self.linear1 = nn.Linear(hidden_size, widths[0])
        self.linear2 = nn.Linear(widths[0], widths[1])
        self.output_linear = nn.Linear(widths[1], 2)
        self.fallback = DEFAULT_FALLBACK
        self.origin: Training | None = None
        """what it was trained under; None: not known"""

    @property
    def hidden_size(self) -> int:
        """D of the LLM that the agent was made for."""
        return self.linear1.in_features

    @property
    def widths(self) -> tuple[int, int]:
        """Sizes of the two hidden layers."""
        return self.linear1.out_features, self.linear2.out_features

    def forward(self, states: Tensor) -> Tensor:
        """(N, D) last hidden states after the final norm → (N, 2) logits of rejecting and accepting."""
        x = torch.relu(self.linear1(self.ln(states)))
        x = torch.relu(self.linear2(x))
        logits: Tensor = self.output_linear(x)
        return logits

    def margin(self, states: Tensor) -> Tensor:
        """(N, D) → (N,) accept logit minus reject logit; a candidate is accepted where this exceeds the threshold."""
        logits = self.forward(states)
        return logits[:, 1] - logits[:, 0]

    def save(self, path: Path) -> None:
        """Write a .safetensors file with fallback and training; equal agents make equal files. Raises OSError."""
        training = None if self.origin is None else asdict(self.origin)
        metadata = {METADATA: json.dumps({"fallback": self.fallback, "training": training}, sort_keys=True)}
        write_atomic(path, safetensors.torch.save(cpu_state(self), metadata))  # the library hides a disk's errors


def untrained(hidden_size: int, seed: int, widths: tuple[int, int] = AGENT_WIDTHS) -> Agent:
    """An agent with random weights, for tests, benchmarks and controls. It aligns nothing."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Agent(hidden_size, widths).eval()


def cpu_state(agent: Agent) -> dict[str, Tensor]:
    """The state dict of a released `.pth` file, on the CPU."""
    return {name: tensor.detach().cpu() for name, tensor in agent.state_dict().items()}


def load(path: Path) -> Agent:
    """Read a released `.pth` checkpoint or a `.safetensors` file; the widths follow from the shapes.

    Never runs pickled code (`weights_only=True`). Raises AgentError.
    """
    try:
        exists = path.is_file()
    except (OSError, ValueError):  # a path that no file can have
        exists = False
    if not exists:
        raise AgentError(f"no agent file found at {path}{_suggestion(path)}")
    if (size := path.stat().st_size) > MOST_BYTES:
        raise AgentError(f"{path} is not a MARA agent: it has {size:,} bytes, and an agent has at most {MOST_BYTES:,}")
    state, metadata = _read_safetensors(path) if path.suffix.lower() == ".safetensors" else _read_pickle(path)
    for name, tensor in state.items():
        if tensor.layout is not torch.strided or tensor.is_meta or not tensor.is_floating_point():
            raise AgentError(f"{path} is not a MARA agent: {name} is not a dense floating-point tensor")
    if 4 * sum(tensor.numel() for tensor in state.values()) > MOST_BYTES:  # a view may be larger than the file
        raise AgentError(f"{path} is not a MARA agent: its tensors take more than {MOST_BYTES:,} bytes")
    if any(name.startswith("linear11.") for name in state):
        raise AgentError(f"{path} holds the twin critics of a training run: pass the actor's file instead")
    agent = Agent(*_sizes(path, state))
    shapes = {name: tensor.shape for name, tensor in agent.state_dict().items()}
    for name, tensor in state.items():
        if tensor.shape != shapes.get(name):
            expected = f"expected {list(shapes[name])}" if name in shapes else "there is no such parameter"
            raise AgentError(f"{path} is not a MARA agent: {name} has shape {list(tensor.shape)}; {expected}")
    agent.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    if not all(torch.isfinite(p).all() for p in agent.parameters()):
        raise AgentError(f"{path} is damaged: some weights are not finite")
    if METADATA in metadata:
        agent.fallback, agent.origin = _read_metadata(path, metadata[METADATA])
    return agent.eval()


def _read_metadata(path: Path, text: str) -> tuple[str, Training | None]:
    """(fallback, training) of an agent's file."""
    try:
        reader = JsonReader(f"{path} has metadata", {METADATA: load_object(text)}, "train the agent again")
        reader.get(METADATA, dict)
        found = reader.text(f"{METADATA}.fallback", FALLBACKS), Training.read(reader, f"{METADATA}.training")
        reader.reject_unknown()
        return found
    except ValueError as error:
        raise AgentError(f"{path} has metadata that is not valid JSON ({error}): train the agent again") from None
    except BundleError as error:
        raise AgentError(str(error)) from None


def _suggestion(path: Path) -> str:
    """What to pass instead of a path that is not a file."""
    try:
        agents = sorted(p.name for p in path.iterdir() if p.suffix in (".safetensors", ".pth"))
    except (OSError, ValueError):
        agents = []
    if agents:
        name = "agent.safetensors" if "agent.safetensors" in agents else agents[0]
        return f", which is a folder with {name} in it: pass {path / name}"
    return ": an agent is a .pth or .safetensors file, hub-id:file, or `demo`"


def _sizes(path: Path, state: dict[str, Tensor]) -> tuple[int, tuple[int, int]]:
    """(D, widths) by the shapes of the linear layers."""
    missing = [name for name in _PARAMETERS if name not in state]
    prefix = next((name.removesuffix("ln.weight") for name in state if name.endswith(".ln.weight")), "")
    if missing and prefix and all(f"{prefix}{name}" in state for name in _PARAMETERS):
        fix = "save the state_dict() of DataParallel's .module" if prefix == "module." else "save them without it"
        raise AgentError(f"{path} is not a MARA agent: its parameter names have the prefix {prefix!r}: {fix}")
    if missing:
        raise AgentError(f"{path} is not a MARA agent: missing {', '.join(missing)}")
    if any(state[f"{layer}.weight"].dim() != 2 for layer in ("linear1", "linear2")):
        raise AgentError(f"{path} is not a MARA agent: its linear weights are not matrices")
    (first, hidden_size), (second, _) = state["linear1.weight"].shape, state["linear2.weight"].shape
    if not (first and second and hidden_size):
        raise AgentError(f"{path} is not a MARA agent: a layer has size 0")
    return hidden_size, (first, second)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise AgentError(f"{path} cannot be read as safetensors: {error}") from None


def _read_pickle(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        entries = []  # a file of PyTorch before 1.6, or a damaged one
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise AgentError(f"{path} has compressed entries, which torch.save does not write: save the agent again")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise AgentError(f"{path} has entries that are larger than the file: fetch or save the agent again")
    if any(name in path.read_bytes() for name in _MAKES_BYTES):
        raise AgentError(f"{path} is not a plain state dict of tensors: its pickle makes bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch comments on the age of the format
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        reason = _ANSI_COLOUR.sub("", first_line(error))
        if disallowed := _DISALLOWED_GLOBAL.search(str(error)):
            reason = (
                f"it is a pickled module or other object ({disallowed[1]}), whose code is never run: save its "
                "state_dict(), as torch.save(agent.state_dict(), file)"
            )
        raise AgentError(f"{path} cannot be read as a PyTorch state dict: {reason}") from None
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise AgentError(f"{path} is not a plain state dict of tensors, as released agents are")
    return state, {}
