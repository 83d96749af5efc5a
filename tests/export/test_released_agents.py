"""Agents in the shapes released with MARA, from the Hub; and the script that runs a real one."""

from __future__ import annotations

import importlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForSequenceClassification

from mara_deploy.commands import export
from mara_runtime import AlignedDecoder, DecodeConfig
from mara_runtime.bundle import Bundle
from tests import checkpoints
from tests.export.conftest import edit_json
from tests.oracle import decode

AGENTS = "IAAR-Shanghai/MARA_AGENTS"


def as_bytes(state: dict[str, torch.Tensor]) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def as_written(state: dict[str, torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """The network of the paper, written out: (N, D) → (N, 2)."""

    def scores(x: torch.Tensor) -> torch.Tensor:
        x = functional.layer_norm(x, x.shape[-1:], state["ln.weight"], state["ln.bias"])
        x = torch.relu(x @ state["linear1.weight"].T + state["linear1.bias"])
        x = torch.relu(x @ state["linear2.weight"].T + state["linear2.bias"])
        return x @ state["output_linear.weight"].T + state["output_linear.bias"]

    return scores


def test_an_agent_of_a_released_shape_from_the_hub(cached, tmp_path, capsys):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260, hidden_size=2048, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=128, bos_token_id=256, eos_token_id=257,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.lm_head.weight.data.mul_(3.0)  # else all tokens are almost equally probable
    llm = tmp_path / "llm"
    model.save_pretrained(llm)
    states = checkpoints.sample_states(checkpoints.load(llm), n=128)
    state = checkpoints.make_agent(2048, seed=0, widths=(1024, 256), sample_states=states).state_dict()
    cached(AGENTS, {"some/llm_actor.pth": as_bytes(state)})
    out = tmp_path / "out"
    options = ["--model", str(llm), "--agent", f"{AGENTS}:some/llm_actor.pth", "--out", str(out), "--no-gate"]
    assert export.main(options) == 0, capsys.readouterr().err
    bundle = Bundle.open(out)
    assert bundle.manifest.agents[0].source == f"{AGENTS}:some/llm_actor.pth"
    assert (bundle.manifest.agents[0].hidden_size, bundle.manifest.agents[0].widths) == (2048, (1024, 256))
    assert bundle.manifest.agents[0].fallback == "first"

    found = AlignedDecoder(bundle, threads=1).generate([256, 72, 105], DecodeConfig(max_new_tokens=12))
    expected = decode(checkpoints.load(llm), as_written(state), [256, 72, 105], eos_ids=[257], max_new_tokens=12)
    assert min(expected.gaps) > 1e-5  # rounding decides nothing
    assert found.token_ids == expected.token_ids
    assert found.stats.decisions > 5
    assert found.stats.examined > found.stats.decisions  # some are rejected


# ── the script ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def script() -> Any:
    return importlib.import_module("examples.released_agent")


def beaver(folder: Path, seed: int) -> Path:
    """A tiny model like PKU-Alignment's: a Llama with a renamed score head and no chat template."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=260, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=1024, num_labels=1, pad_token_id=259,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    weights["score_head.weight"] = weights.pop("score.weight") * 50
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    edit_json(folder / "config.json", architectures=["LlamaModelForScore"], score_dim=1, id2label=None)
    checkpoints.add_tokenizer(folder, 260)
    edit_json(folder / "tokenizer_config.json", chat_template=...)
    return folder


def test_the_script_runs_end_to_end(script, cached, checkpoint, agent_file, tmp_path, capsys):
    cached("meta-llama/Llama-3.2-1B-Instruct", checkpoint("llama"))
    cached(AGENTS, {"llama_actor.pth": as_bytes(load_file(agent_file("llama")))})
    for seed, kind in enumerate(("reward", "cost")):
        cached(f"PKU-Alignment/beaver-7b-v1.0-{kind}", beaver(tmp_path / kind, seed))
    out = tmp_path / "out"
    options = ["--agent", f"{AGENTS}:llama_actor.pth", "--out", str(out), "--max-new-tokens", "12"]
    assert script.main([*options, "--", "--score-device", "cpu"]) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert printed.count("▶ ") == printed.count("[plain: ") == printed.count("[aligned: ") == 10
    assert "$ mara-export --model llama3.2-1b" in printed
    found = json.loads((out / "eval" / "result.json").read_text())
    scores = {f"PKU-Alignment/beaver-7b-v1.0-{kind}": weight for kind, weight in (("reward", 1.0), ("cost", -1.0))}
    assert found["scores"] == scores
    assert found["prompts"]["unique"] == 10
    combined = found["comparisons"]["greedy"]["combined"]
    assert combined["wins"] + combined["losses"] > 0
    assert (out / "eval" / "report.html").is_file()

    # with another score, on the existing bundle
    (tmp_path / "own_score.py").write_text("def length(prompts, answers):\n    return [len(a) for a in answers]\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        assert script.main([*options, "--", "--score", "own_score:length", "--quiet"]) == 0
    assert json.loads((out / "eval" / "result.json").read_text())["scores"] == {"own_score:length": 1.0}


def test_the_script_refuses_a_bundle_made_with_other_options(
    script, checkpoint, agent_file, bundle, tmp_path, monkeypatch, capsys
):
    shutil.copytree(bundle("qwen2"), tmp_path / "out" / "bundle")
    shown = []
    monkeypatch.setattr(script, "show_answers", lambda *_: shown.append(True))
    monkeypatch.setattr(script.eval, "main", lambda _: 0)

    def run(**changed: object) -> int:
        options = {"model": checkpoint("qwen2"), "agent": agent_file("qwen2"), "precision": "fp32", **changed}
        return script.main([f"--{name}={value}" for name, value in options.items()] + ["--out", str(tmp_path / "out")])

    assert run() == 0, capsys.readouterr().err
    for flag, asked, name, made in (
        ("model", checkpoint("llama"), "llama", "qwen2"),
        ("model", "qwen2", "Qwen/Qwen2-0.5B-Instruct", "qwen2"),
        ("agent", agent_file("llama"), "llama-agent.safetensors", "qwen2-agent.safetensors"),
        ("agent", f"{AGENTS}:a.pth", f"{AGENTS}:a.pth", "qwen2-agent.safetensors"),
        ("precision", "int8", "int8", "fp32"),
    ):
        capsys.readouterr()
        assert run(**{flag: asked}) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"--{flag} is {name}" in line
        assert f"made with {made}" in line
        assert "--out" in line
    assert len(shown) == 1


def test_the_script_without_an_agent_lists_them(script, hf_home, monkeypatch, tmp_path, capsys):
    def refusal() -> str:
        assert script.main(["--out", str(tmp_path / "out")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert not (tmp_path / "out").exists()
        return line

    assert f"--agent is missing, and {AGENTS} cannot be listed" in refusal()
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda _: ["README.md", "a_actor.pth", "b_actor.pth"])
    assert f"--agent is missing; {AGENTS} has a_actor.pth, b_actor.pth" in refusal()
