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
from tests.export.conftest import copy_model


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def recipe() -> dict[str, Any]:
    return json.loads((MODEL / "recipe.json").read_text())


def test_folder_holds_exactly_the_model_and_is_small() -> None:
    configs = {"config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"}
    others = {"model.safetensors", "tokenizer.json", "chat_template.jinja", "recipe.json"}
    assert {f.name for f in MODEL.iterdir()} == configs | others
    assert sum(f.stat().st_size for f in MODEL.iterdir()) <= 8_000_000


def test_it_is_qwen2_in_fp32_with_a_list_of_end_tokens_as_the_recipe_says(model, tokenizer, recipe) -> None:
    config, made = model.config, recipe["recipe"]
    assert made == json.loads(json.dumps(asdict(Recipe()))), "retrain the shipped model"
    assert (made["seed"], made["steps"]) == (0, 1400)
    assert config.architectures == ["Qwen2ForCausalLM"]
    assert model.dtype == torch.float32
    assert config.vocab_size == made["vocab_size"]
    assert config.hidden_size == made["hidden_size"]
    assert config.num_hidden_layers == made["layers"]
    assert config.max_position_embeddings == made["context"] == 512
    assert model.num_parameters() == recipe["parameters"]
    assert set(recipe["versions"]) == {"python", "torch", "transformers", "tokenizers"}
    ends = json.loads((MODEL / "generation_config.json").read_text())["eos_token_id"]
    assert tokenizer.convert_ids_to_tokens(ends) == ["<|im_end|>", "<|endoftext|>"]
    assert model.generation_config.eos_token_id == ends == lm.end_ids(tokenizer)


def test_shipped_tokenizer_is_the_one_that_the_recipe_makes(tokenizer: Any) -> None:
    assert lm.train_tokenizer(Recipe()).get_vocab() == tokenizer.get_vocab()


def test_chat_template_and_any_bytes_survive_the_tokenizer(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "How do I cook rice?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == corpus.chat("How do I cook rice?")
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")
    for odd in ("  naïve café 東京 🙂\n\ttabs", "<|im_start|>"):
        assert tokenizer.decode(tokenizer(odd, add_special_tokens=False)["input_ids"]) == odd


def test_held_out_perplexity_is_as_recorded_and_shows_a_model_loaded_wrongly(
    model, tokenizer, recipe, tmp_path
) -> None:
    wrong = AutoModelForCausalLM.from_pretrained(copy_model(MODEL, tmp_path / "wrong", rope_theta=1e6)).eval()
    ours, theirs = (math.exp(measure.validation_loss(m, tokenizer, n=60, seed=1)) for m in (model, wrong))
    assert ours == pytest.approx(recipe["held_out"]["perplexity"], rel=0.05)
    assert theirs > 1.2 * ours


def test_greedy_answers_end_are_grammatical_and_full_of_decisions(model: Any, tokenizer: Any) -> None:
    asked = prompts(24, seed=7, held_out_split=True)
    result = measure.greedy(model, tokenizer, asked)
    assert all(result.finished)
    assert max(result.lengths) < measure.MAX_NEW_TOKENS
    pairs = zip(asked, result.answers, strict=True)
    said = [corpus.known(s, prompt.task) for prompt, answer in pairs for s in sentences(answer)]
    assert len(said) > 3 * len(asked)
    assert sum(said) / len(said) > 0.9
    assert len(set(result.answers)) > 0.8 * len(asked)
    assert 0.15 < result.decision_share < 0.40
    assert 2.5 < result.candidates_per_decision < 8
    alone = measure.greedy(model, tokenizer, asked[:1])  # in a batch as alone
    assert (alone.answers, alone.lengths) == (result.answers[:1], result.lengths[:1])
    assert alone.candidates == result.candidates[: len(alone.candidates)]


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


def test_an_occupied_folder_and_numbers_out_of_range_are_refused_in_one_line(tmp_path: Path, capsys: Any) -> None:
    for flag, value in (("--steps", "0"), ("--threads", "0"), ("--seed", "-1")):
        assert train.main(["--out", str(tmp_path / "lm"), f"{flag}={value}"]) == 2
        assert f"error: {flag} is {value}; it must be " in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
    (tmp_path / "mine.txt").write_text("keep")
    for command in (train, remake):
        assert command.main(["--out", str(tmp_path)]) == 2
        (error,) = capsys.readouterr().err.splitlines()
        assert str(tmp_path) in error
        assert (tmp_path / "mine.txt").read_text() == "keep"
