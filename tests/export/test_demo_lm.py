"""The embedded demo LM: what is shipped is whole, sound and says how it was made; the recipe can be repeated."""

import json
import math
import random
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.demo_lm import __main__ as remake
from examples.demo_lm import corpus, lm, measure, train
from examples.demo_lm.recipe import Recipe
from mara_deploy.demo import MODEL_FOLDER as MODEL
from mara_deploy.demo.prompts import prompts
from mara_deploy.demo.score import sentences

PERPLEXITY_BOUND = 1.5
"""Held-out perplexity per answer token; measured: the shipped model 1.40, loaded with RoPE base 1e6 1.95, with a
normalisation epsilon of 1e-2 1.84."""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def recipe() -> dict[str, Any]:
    return json.loads((MODEL / "recipe.json").read_text())


def held_out_perplexity(model: Any, tokenizer: Any) -> float:
    return math.exp(measure.validation_loss(model, tokenizer, n=100, seed=1))


def test_folder_holds_exactly_the_model_and_is_small() -> None:
    assert {f.name for f in MODEL.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "recipe.json",
    }
    assert sum(f.stat().st_size for f in MODEL.iterdir()) <= 8_000_000


def test_is_qwen2_in_fp32_with_a_list_of_end_tokens(model: Any, tokenizer: Any) -> None:
    assert model.config.architectures == ["Qwen2ForCausalLM"]
    assert model.dtype == torch.float32
    assert model.config.max_position_embeddings == 512
    ends = json.loads((MODEL / "generation_config.json").read_text())["eos_token_id"]
    assert tokenizer.convert_ids_to_tokens(ends) == ["<|im_end|>", "<|endoftext|>"]
    assert model.generation_config.eos_token_id == ends == lm.end_ids(tokenizer)


def test_recipe_matches_the_model_and_the_defaults(model: Any, recipe: dict[str, Any]) -> None:
    assert recipe["recipe"] == json.loads(json.dumps(asdict(Recipe()))), "retrain the shipped model"
    assert recipe["recipe"]["seed"] == 0
    assert recipe["recipe"]["steps"] == 1400
    config, made = model.config, recipe["recipe"]
    assert config.vocab_size == made["vocab_size"]
    assert config.hidden_size == made["hidden_size"]
    assert config.num_hidden_layers == made["layers"]
    assert config.max_position_embeddings == made["context"]
    assert model.num_parameters() == recipe["parameters"]
    assert set(recipe["versions"]) == {"python", "torch", "transformers", "tokenizers"}


def test_shipped_tokenizer_is_the_one_that_the_recipe_makes(tokenizer: Any) -> None:
    assert lm.train_tokenizer(Recipe()).get_vocab() == tokenizer.get_vocab()


def test_chat_template_and_any_bytes_survive_the_tokenizer(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "How do I cook rice?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == corpus.chat("How do I cook rice?")
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")
    for odd in ("  naïve café 東京 🙂\n\ttabs", "<|im_start|>"):
        assert tokenizer.decode(tokenizer(odd, add_special_tokens=False)["input_ids"]) == odd


def test_held_out_perplexity(model: Any, tokenizer: Any, recipe: dict[str, Any]) -> None:
    perplexity = held_out_perplexity(model, tokenizer)
    assert perplexity < PERPLEXITY_BOUND
    assert perplexity == pytest.approx(recipe["held_out"]["perplexity"], rel=0.05)


@pytest.mark.parametrize("mistake", [{"rope_theta": 1e6}, {"rms_norm_eps": 1e-2}])
def test_the_perplexity_bound_catches_a_model_loaded_wrongly(mistake: dict[str, float], tokenizer: Any) -> None:
    wrong = AutoModelForCausalLM.from_pretrained(MODEL, **mistake).eval()
    assert held_out_perplexity(wrong, tokenizer) > PERPLEXITY_BOUND


def test_greedy_answers_end_are_grammatical_and_full_of_decisions(model: Any, tokenizer: Any) -> None:
    asked = prompts(40, seed=7, held_out_split=True)
    result = measure.greedy(model, tokenizer, asked)
    assert all(result.finished)
    assert max(result.lengths) < measure.MAX_NEW_TOKENS
    pairs = zip(asked, result.answers, strict=True)
    said = [corpus.known(s, prompt.task) for prompt, answer in pairs for s in sentences(answer)]
    assert len(said) > 3 * len(asked)
    assert sum(said) / len(said) > 0.9
    assert len(set(result.answers)) > 35
    assert 0.15 < result.decision_share < 0.40
    assert 2.5 < result.candidates_per_decision < 8


def test_greedy_in_a_batch_is_greedy_alone(model: Any, tokenizer: Any) -> None:
    asked = prompts(4, seed=8, held_out_split=True)
    together = measure.greedy(model, tokenizer, asked)
    alone = [measure.greedy(model, tokenizer, [p]) for p in asked]
    assert together.answers == [a.answers[0] for a in alone]
    assert together.lengths == [a.lengths[0] for a in alone]
    assert together.candidates == [n for a in alone for n in a.candidates]


SHORT = Recipe(steps=12, warmup_steps=3, tokenizer_dialogues=300, vocab_size=512, context=256, batch=2)


def test_retraining_is_deterministic_and_learns() -> None:
    first, _, losses = lm.train(SHORT, progress=False)
    torch.manual_seed(123)  # the caller's random state must not matter
    second, _, again = lm.train(SHORT, progress=False)
    other, _, different = lm.train(replace(SHORT, seed=1), progress=False)
    assert losses == again
    for (name, a), (_, b) in zip(first.state_dict().items(), second.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert losses != different
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert losses[0] == pytest.approx(math.log(SHORT.vocab_size), rel=0.05)  # knows nothing yet
    assert losses[-1] < losses[0] - 1.0


def test_only_answers_are_predicted(tokenizer: Any) -> None:
    endless = lm.dialogues(random.Random(0))
    ids, wanted = next(lm.pack(lm.encode(tokenizer, endless), Recipe()))
    assert ids.shape == wanted.shape == (Recipe().batch, Recipe().context)
    text = tokenizer.decode(ids[0][wanted[0]])
    expected = [answer + "<|im_end|>" for _, answer in lm.dialogues(random.Random(0), n=4)]
    assert text.startswith("".join(expected))
    assert "<|im_start|>" not in text


def test_write_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "measure", lambda *_: {"validation_loss_nats": 1.0})
    out = tmp_path / "new" / "lm"
    out.mkdir(parents=True)  # an empty folder may be there
    record = train.write(out, replace(SHORT, steps=1), progress=False)
    assert json.loads((out / "recipe.json").read_text()) == json.loads(json.dumps(record))
    assert AutoModelForCausalLM.from_pretrained(out).config.vocab_size == SHORT.vocab_size
    assert [f.name for f in out.parent.iterdir()] == ["lm"]

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", fail)
    with pytest.raises(KeyboardInterrupt):
        train.write(tmp_path / "broken", replace(SHORT, steps=1), progress=False)
    assert [f.name for f in tmp_path.iterdir()] == ["new"]


@pytest.mark.parametrize("command", [train, remake])
def test_an_occupied_folder_is_refused_in_one_line(
    command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    assert command.main(["--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(tmp_path) in error
    assert (tmp_path / "mine.txt").read_text() == "keep"


@pytest.mark.parametrize("option", ["--steps=0", "--threads=0", "--seed=-1"])
def test_numbers_out_of_range_are_refused(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--out", str(tmp_path / "lm"), option]) == 2
    flag, _, value = option.partition("=")
    assert f"error: {flag} is {value}; it must be " in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
