"""Tiny checkpoints, agents and bundles, made once per session. Tests must not change them: damage a copy."""

from __future__ import annotations

import importlib
import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, TextIO

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from examples.demo_lm import corpus
from mara_deploy import agent as agents
from mara_deploy.demo import MODEL_FOLDER, NAME, demo_agent, demo_model
from mara_deploy.demo.prompts import prompts
from mara_deploy.scores import load
from mara_deploy.scores.function import load_function
from mara_export.export import NamedAgent, finish
from mara_export.hf.sources import resolve_model
from mara_export.options import ExportOptions
from mara_export.targets import LOWERINGS
from mara_export.tracing import Traced, trace
from mara_runtime import AlignedDecoder
from tests import checkpoints, oracle
from tests.export.following import Tally, rounding_of

# Matrices are tiny: a second thread only waits for the first, for minutes where other processes want the cores too.
torch.set_num_threads(1)

CHECKPOINT_SEED, AGENT_SEED = 0, 1
MAX_CONTEXT, MAX_CANDIDATES = 256, 64
COVERING = {("qwen2", "ort"), ("qwen3", "portable"), ("llama", "decomposed"), ("mistral", "ort")}
"""Every architecture and every lowering once; the other combinations are left to `make test-long`."""
PAIRS = [
    pytest.param(both, id="-".join(both), marks=() if both in COVERING else pytest.mark.long)
    for both in product(checkpoints.ARCHITECTURES, LOWERINGS)
]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """architecture → folder of a tiny checkpoint with a tokenizer that adds BOS, and a chat template."""
    root = tmp_path_factory.mktemp("checkpoints")

    @cache
    def make(architecture: str) -> Path:
        folder = checkpoints.make(architecture, root / architecture, seed=CHECKPOINT_SEED)
        checkpoints.add_tokenizer(folder, checkpoints.load(folder).config.vocab_size)
        return folder

    return make


@pytest.fixture(scope="session")
def reference(checkpoint: Callable[[str], Path]) -> Callable[[str], Any]:
    """architecture → the checkpoint as a Hugging Face model: float32, eager attention, eval."""
    return cache(lambda architecture: checkpoints.load(checkpoint(architecture)))


@pytest.fixture(scope="session")
def agent_file(tmp_path_factory: pytest.TempPathFactory, reference: Callable[[str], Any]) -> Callable[[str], Path]:
    """architecture → a .safetensors agent that accepts about 60 % of the states of the model's own text."""
    root = tmp_path_factory.mktemp("agents")

    @cache
    def make(architecture: str) -> Path:
        model = reference(architecture)
        states = checkpoints.sample_states(model, seed=AGENT_SEED)
        agent = checkpoints.make_agent(model.config.hidden_size, seed=AGENT_SEED, sample_states=states)
        path = root / f"{architecture}-agent.safetensors"
        save_file(agent.state_dict(), path)
        return path

    return make


@pytest.fixture(scope="session")
def agent(agent_file: Callable[[str], Path]) -> Callable[[str], agents.Agent]:
    """architecture → the agent of `agent_file`, in PyTorch."""
    return cache(lambda architecture: agents.load(agent_file(architecture)))


@pytest.fixture(scope="session")
def traced(
    tmp_path_factory: pytest.TempPathFactory,
    checkpoint: Callable[[str], Path],
    agent: Callable[[str], agents.Agent],
    agent_file: Callable[[str], Path],
) -> Callable[[str], Traced]:
    """architecture or "demo" → the model and its agent, traced once for all bundles of a session."""

    @cache
    def make(architecture: str) -> Traced:
        if architecture == NAME:
            given = demo_model(), checkpoints.named(demo_agent(), NAME)
        else:
            source = resolve_model(str(checkpoint(architecture)))
            given = source, [NamedAgent("agent", agent_file(architecture).name, agent(architecture))]
        folder = tmp_path_factory.mktemp("trace")
        return trace(*given, folder, max_context=MAX_CONTEXT, max_candidates=MAX_CANDIDATES)

    return make


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory, traced: Callable[[str], Traced]) -> Callable[..., Path]:
    """(architecture or "demo", lowering="ort", precision="fp32") → folder of a bundle that passed the gate."""
    root = tmp_path_factory.mktemp("bundles")

    @cache
    def make(architecture: str, lowering: str, precision: str) -> Path:
        out = root / f"{architecture}-{lowering}-{precision}"
        options: dict[str, Any] = {
            "lowering": lowering,
            "precision": precision,
            "max_context": MAX_CONTEXT,
            "max_candidates": MAX_CANDIDATES,
        }
        finish(traced(architecture), ExportOptions(**options), out)
        return out

    return lambda architecture, lowering="ort", precision="fp32": make(architecture, lowering, precision)


@pytest.fixture(scope="session")
def subject(reference, agent):
    """name → (Hugging Face model, agent, prompts of token ids): 50 of the demo, 20 of a random model."""

    @cache
    def get(name: str):
        if name == "demo":
            texts = [corpus.chat(p.text) for p in prompts(50, 11, True)]
            ids = AutoTokenizer.from_pretrained(MODEL_FOLDER)(texts, add_special_tokens=False)["input_ids"]
            return checkpoints.load(MODEL_FOLDER), demo_agent(), ids
        lengths = (1, 2, 5, 17, 40)
        ids = [prompt for n in lengths for prompt in checkpoints.random_prompts(4, seed=n, length=n)]
        return reference(name), agent(name), ids

    return get


@pytest.fixture(scope="session")
def tally(subject):
    """(name, what is checked) → a tally."""

    @cache
    def rounding(name: str) -> float:
        model, _, prompts = subject(name)
        return rounding_of(model, prompts[-8:])

    return lambda name, what: Tally(f"{name}, {what}", rounding(name))


@pytest.fixture(scope="session")
def answers(subject):
    """(name, count, every, options) → [(prompt, the oracle's answer)] of so many prompts, computed once.

    every: take each prompt (1), each second one (2), …
    """

    @cache
    def answer(name: str, index: int, **options):
        model, agent, prompts = subject(name)
        return oracle.decode(model, agent, prompts[index], eos_ids=model.generation_config.eos_token_id, **options)

    def get(name: str, count: int | None = None, every: int = 2, **options):
        chosen = list(enumerate(subject(name)[2]))[::every][:count]
        return [(prompt, answer(name, index, **options)) for index, prompt in chosen]

    return get


@pytest.fixture(scope="session")
def decoder(bundle):
    """(name, lowering) → the product, on one thread."""
    return cache(lambda name, lowering: AlignedDecoder(bundle(name, lowering), threads=1))


PROGRESS = re.compile(
    r"mara-export: loading PyTorch and transformers …|  \S.* +(\d+\.\d s|from /.*)|  note: .*"
    r"|engine cpu \(.*\)|engine cuda declined: .*|agent .*, fallback (first|last)"
)


@dataclass
class CommandResult:
    """What a command returned and printed."""

    code: int
    out: str
    err: str

    def refusal(self, prog: str) -> str:
        """The one line of a refusal: exit code 2, nothing on stdout, only progress before it."""
        assert (self.code, self.out) == (2, ""), self
        *before, last = self.err.splitlines()
        assert last.startswith(f"{prog}: error: "), self.err
        assert [line for line in before if not PROGRESS.fullmatch(line)] == []
        return last.removeprefix(f"{prog}: error: ")


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., CommandResult]:
    """("run", argument, …, stdin="") → CommandResult; runs in this process, its standard input not a terminal."""

    def run(name: str, *argv: object, stdin: str | TextIO = "") -> CommandResult:
        main = importlib.import_module(f"mara_deploy.commands.{name}").main
        monkeypatch.setattr(load, "IsolatedScore", load_function)  # tests watch and change their scores
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin) if isinstance(stdin, str) else stdin)
        capfd.readouterr()
        try:
            code = main([str(argument) for argument in argv])
        except SystemExit as left:
            code = left.code
        return CommandResult(code, *capfd.readouterr())

    return run


@pytest.fixture
def bundle_copy(bundle: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """(architecture="qwen2", lowering="ort") → a copy that a test may damage."""

    def copy(architecture: str = "qwen2", lowering: str = "ort") -> Path:
        return Path(shutil.copytree(bundle(architecture, lowering), tmp_path / "copied-bundle"))

    return copy


REVISION = "0123456789abcdef0123456789abcdef01234567"
NOWHERE = "http://127.0.0.1:9"
"""A Hub that refuses at once."""


@pytest.fixture
def hf_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face home, and a Hub that cannot be reached."""
    home = tmp_path / "hf-home"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", NOWHERE)
    return home


@pytest.fixture
def cached(hf_home: Path) -> Callable[..., Path]:
    """(repository, files or folder, revision=…, main=True) → its snapshot, laid out by hand in the Hub's cache."""

    def lay_out(repository: str, files: Path | dict[str, bytes], revision: str = REVISION, main: bool = True) -> Path:
        root = hf_home / "hub" / f"models--{repository.replace('/', '--')}"
        snapshot = root / "snapshots" / revision
        if isinstance(files, Path):
            files = {path.name: path.read_bytes() for path in files.iterdir()}
        for name, data in files.items():
            (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            (snapshot / name).write_bytes(data)
        if main:
            (root / "refs").mkdir(exist_ok=True)
            (root / "refs" / "main").write_text(revision)
        return snapshot

    return lay_out


def edit_json(path: Path, **values: Any) -> None:
    """Change entries of a JSON file; `...` removes one."""
    merged = {**json.loads(path.read_text(encoding="utf-8")), **values}
    path.write_text(json.dumps({key: value for key, value in merged.items() if value is not ...}), encoding="utf-8")


def copy_model(source: Path, folder: Path, **config: Any) -> Path:
    """A copy of a checkpoint with entries of config.json changed."""
    shutil.copytree(source, folder)
    edit_json(folder / "config.json", **config)
    return folder
