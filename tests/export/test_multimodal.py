"""The text part of models that take images or sound, too: what the whole model makes of text."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from mara_deploy.prompts import Prompt
from mara_deploy.scores.base import Combined, WeightedScore
from mara_deploy.scores.load import load_score
from mara_deploy.train.config import RECIPES
from mara_deploy.train.task import open_task
from mara_export.errors import ModelError
from mara_export.hf import weights
from mara_export.hf.checkpoint import eos_token_ids, load_model, open_stored
from mara_export.hf.sources import ModelSource
from mara_runtime import AlignedDecoder, DecodeConfig
from tests import checkpoints, oracle
from tests.export.following import Tally, follow_all, rounding_of
from tests.packings import Kind, pack

SIGHT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SIGLIP = {**SIGHT, "model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14}
WHOLE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gemma3_text": ("Gemma3", "gemma3", {"vision_config": SIGLIP, "mm_tokens_per_image": 4}),
    "gemma4_text": (
        "Gemma4",
        "gemma4",
        {
            "vision_config": {**SIGHT, "num_key_value_heads": 2, "head_dim": 8},
            "audio_config": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        },
    ),
    "ministral3": ("Mistral3", "mistral3", {"vision_config": {**SIGHT, "model_type": "pixtral", "head_dim": 8}}),
    "mistral": ("Mistral3", "mistral3", {"vision_config": {**SIGHT, "model_type": "pixtral", "head_dim": 8}}),
}
"""By text part: the class of the whole model, its model_type, and the tiny rest of its configuration."""
HERE = [text for text, (kind, *_) in WHOLE.items() if hasattr(transformers, f"{kind}Config")]
if transformers.__version__ < "5":
    HERE.remove("ministral3")  # the text part only is new
    QUICK = {*HERE}
else:
    QUICK = {"gemma4_text", "ministral3"}
TOKENS = {"max_new_tokens": 48, "fallback": "first"}


def source(folder: Path) -> ModelSource:
    return ModelSource(folder, folder.name, None)


def kind_of(text: str) -> Any:
    return getattr(transformers, f"{WHOLE[text][0]}ForConditionalGeneration")


@pytest.fixture(scope="module")
def whole(checkpoint, tmp_path_factory) -> Callable[[str], Path]:
    """text part → folder of a model that has it beside a random rest, as transformers saves it."""

    @cache
    def make(text: str) -> Path:
        own = checkpoint(text)
        kind, _, rest = WHOLE[text]
        model = checkpoints.load(own)
        tied = model.config.tie_word_embeddings
        config = getattr(transformers, f"{kind}Config")(
            text_config=model.config.to_dict(), tie_word_embeddings=tied, **rest
        )
        made = kind_of(text)(config).eval()
        made.model.language_model.load_state_dict(model.model.state_dict())
        made.lm_head.load_state_dict(model.lm_head.state_dict())
        made.generation_config = model.generation_config
        folder = tmp_path_factory.mktemp("whole") / text
        made.save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(own / name, folder)
        return folder

    return make


@pytest.mark.parametrize(
    "text", [text if text in QUICK else pytest.param(text, marks=pytest.mark.long) for text in HERE]
)
def test_the_text_part_answers_as_the_whole_model(command, whole, agent, agent_file, tmp_path, text) -> None:
    """The oracle is the whole model; the bundle has passed its gates against the text part."""
    folder, out = whole(text), tmp_path / "bundle"
    exported = command("export", "--model", folder, "--agent", agent_file(text), "--max-context", 128, "--out", out)
    assert exported.code == 0, exported.err
    assert f"note: {text} takes more than text; its text part, {text}, is exported alone" in exported.err
    whole_model = kind_of(text).from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    prompts = checkpoints.random_prompts(4, seed=3, length=20)
    eos = whole_model.generation_config.eos_token_id
    truths = [(ids, oracle.decode(whole_model, agent(text), ids, eos_ids=eos, **TOKENS)) for ids in prompts]
    decoder = AlignedDecoder(out, threads=1)
    follow_all(decoder, DecodeConfig(**TOKENS), truths, Tally(text, rounding_of(whole_model, prompts)))


State = dict[str, torch.Tensor]
AWQ = Kind("awq")


def wrapped(own: Path, folder: Path, rename: Callable[[str], str], **config: Any) -> Path:
    """A text model's checkpoint as the text part of Mistral 3. rename: gives the names of its weights there."""
    shutil.copytree(own, folder)
    said = json.loads((own / "config.json").read_text())
    whole = {"model_type": "mistral3", "text_config": said} | {
        key: said.pop(key) for key in ("quantization_config", "tie_word_embeddings", "eos_token_id") if key in said
    }
    (folder / "config.json").write_text(json.dumps(whole | config))
    state = {rename(name): weight for name, weight in load_file(own / "model.safetensors").items()}
    save_file(state | {"vision_tower.norm.weight": torch.ones(2)}, folder / "model.safetensors", {"format": "pt"})
    return folder


def as_released(name: str) -> str:
    return f"language_model.{name}"


def as_in_5(name: str) -> str:
    return name.replace("model.", "model.language_model.")


@pytest.mark.parametrize("rename", [as_released, as_in_5])
@pytest.mark.parametrize("packed", [False, True], ids=["floats", "awq"])
def test_the_names_of_its_weights(checkpoint, tmp_path, rename, packed) -> None:
    """In files, without most of the rest, streamed and at once. What is said of the whole model is the part's, too."""
    own = pack(checkpoint("mistral"), tmp_path / "packed", AWQ) if packed else checkpoint("mistral")
    folder = wrapped(own, tmp_path / "whole", rename)
    (folder / "generation_config.json").unlink()
    expected = load_model(source(own))
    ids = torch.tensor(checkpoints.random_prompts(1))
    for streamed in (None, tmp_path):
        model = load_model(source(folder), streamed=streamed)
        with torch.no_grad():
            assert torch.equal(model(ids).logits, expected(ids).logits)
    assert weights.Weights(model, open_stored(source(folder))).fingerprint() == weights.Weights(expected).fingerprint()
    assert eos_token_ids(model, None) == (checkpoints.EOS_ID,)
    assert open_stored(source(folder)).keys() == open_stored(source(own)).keys()


def lost(state: State) -> None:
    del state["language_model.model.layers.1.mlp.up_proj.weight"]


def surplus(state: State) -> None:
    state["language_model.model.layers.1.mlp.up_proj.bias"] = torch.ones(96)


def elsewhere(state: State) -> None:
    state["value_head.weight"] = torch.ones(1, 64)


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lost, "whole is not a whole causal LM: it lacks model.layers.1.mlp.up_proj.weight"),
        (surplus, "whole has weights that mistral has no place for: model.layers.1.mlp.up_proj.bias; leave out"),
        (elsewhere, "whole has weights that mistral has no place for: value_head.weight; leave out"),
    ],
)
def test_a_text_part_that_is_not_whole_is_refused(checkpoint, tmp_path, damage, line) -> None:
    folder = wrapped(checkpoint("mistral"), tmp_path / "whole", as_released)
    state = load_file(folder / "model.safetensors")
    damage(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    for streamed in (None, tmp_path):
        with pytest.raises(ModelError, match=re.escape(line)):
            load_model(source(folder), streamed=streamed)


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (
            {"model_type": "paligemma", "text_config": {"model_type": "gemma"}},
            "whole has architecture 'paligemma', which takes more than text; the text part",
        ),
        ({"model_type": "qwen2_vl"}, "whole has architecture 'qwen2_vl', which takes more than text; the text part"),
        ({"text_config": {"model_type": "new"}}, "whole: its text part is 'new', which this version of transformers"),
        ({"text_config": {"model_type": []}}, "whole cannot be loaded: "),
    ],
)
def test_what_cannot_stand_alone_is_refused(command, checkpoint, tmp_path, config, line) -> None:
    """By name, and before weights are read."""
    folder = wrapped(checkpoint("mistral"), tmp_path / "whole", as_released, **config)
    (folder / "model.safetensors").write_bytes(b"no weights")
    assert line in command("export", "--model", folder, "--out", tmp_path / "out").refusal("mara-export")


def test_an_agent_is_trained_on_the_text_part(checkpoint, tmp_path) -> None:
    own, score = checkpoint("mistral"), Combined([WeightedScore(load_score("demo"))])
    folders = wrapped(own, tmp_path / "whole", as_released), own
    ours, theirs = (
        open_task(source(each), [Prompt("Why?")], score, RECIPES["demo"], device="cpu").training for each in folders
    )
    assert (ours.weights, ours.architecture) == (theirs.weights, "mistral")


def test_the_memory_of_the_text_part_is_estimated(command, checkpoint, tmp_path) -> None:
    own = checkpoint("mistral")
    folders = wrapped(own, tmp_path / "whole", as_released), own
    ours, theirs = (command("memory", each) for each in folders)
    assert ours.code == 0
    assert ours.out.splitlines()[1:] == theirs.out.splitlines()[1:]
