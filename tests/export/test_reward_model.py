"""Reward and classification models as scores: tiny ones, made here, against Hugging Face one text at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from mara_deploy.files import fingerprint
from mara_deploy.scores.base import Combined, ScoreError, load_score
from mara_runtime.errors import OptionError

TEXT = "[PAD] [UNK] [CLS] [SEP] <s> </s> user assistant : how do i cook rice wash it gently and wait go away"
WORDS = TEXT.split()
LABELS = ("rude", "plain", "kind")
PROMPTS = ["how do i cook rice", "how", "wait wait wait"]
ANSWERS = ["wash it gently and wait", "go away", "wait"]
TEMPLATE = "user : {prompt} assistant : {answer} </s>"


def tokenizer(decoder: bool, chat: str | None = None) -> Any:
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if not decoder:
        made.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    else:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 4)])
    special = {"eos_token": "</s>", "bos_token": "<s>"} if decoder else {"pad_token": "[PAD]"}
    fast = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", **special)
    fast.chat_template = chat
    return fast


@pytest.fixture
def llama(tmp_path) -> Path:
    """A reward model on a decoder, as most are; its tokenizer has no padding token."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_labels=1, max_position_embeddings=32, pad_token_id=None,
    )  # fmt: skip
    return saved(LlamaForSequenceClassification(config), tokenizer(True), tmp_path / "llama-reward")


@pytest.fixture
def bert(tmp_path) -> Path:
    """A classifier with three labels on an encoder."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, id2label=dict(enumerate(LABELS)), label2id=dict(zip(LABELS, range(3), strict=True)),
    )  # fmt: skip
    return saved(BertForSequenceClassification(config), tokenizer(False), tmp_path / "bert")


def saved(model: Any, tokenizer: Any, folder: Path) -> Path:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)  # so that texts differ in their scores
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def one_by_one(folder: Path, ids: list[list[int]], segments: list[list[int]] | None = None) -> torch.Tensor:
    """Logits (N, labels) of unpadded texts."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    logits = []
    for i, text in enumerate(ids):
        kind = {} if segments is None else {"token_type_ids": torch.tensor([segments[i]])}
        logits.append(model(input_ids=torch.tensor([text]), **kind).logits[0])
    return torch.stack(logits)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_a_reward_model_reads_its_template(llama, batch_size) -> None:
    """In batches of texts of different length, whose last token is also what the padding is made of."""
    score = load_score(str(llama), template=TEMPLATE, batch_size=batch_size)
    texts = [TEMPLATE.format(prompt=p, answer=a) for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    expected = one_by_one(llama, tokenizer(True)(texts)["input_ids"])[:, 0].tolist()
    assert list(score(PROMPTS, ANSWERS)) == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 0.01
    assert score.name == "llama-reward"


def test_without_a_template_the_tokenizers_chat_template_is_used_and_adds_the_special_tokens_alone(llama) -> None:
    chat = "{% for m in messages %}<s> {{ m['role'] }} : {{ m['content'] }} {% endfor %}"
    tokenizer(True, chat).save_pretrained(llama)
    texts = [f"user : {p} <s> assistant : {a}" for p, a in zip(PROMPTS, ANSWERS, strict=True)]  # and <s> before it
    expected = one_by_one(llama, tokenizer(True)(texts)["input_ids"])[:, 0].tolist()
    assert list(load_score(str(llama))(PROMPTS, ANSWERS)) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 8])
def test_a_classifier_gives_the_log_odds_of_a_label_of_a_pair(bert, batch_size) -> None:
    score = load_score(f"{bert}#kind", batch_size=batch_size)
    pairs = tokenizer(False)(PROMPTS, ANSWERS)
    p = one_by_one(bert, pairs["input_ids"], pairs["token_type_ids"]).softmax(1)[:, 2]
    assert list(score(PROMPTS, ANSWERS)) == pytest.approx((p / (1 - p)).log().tolist(), abs=1e-5)
    assert score.name == "bert#kind"


def test_where_a_text_may_have_several_labels_log_odds_are_the_logit(bert) -> None:
    config = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps({**config, "problem_type": "multi_label_classification"}))
    pairs = tokenizer(False)(PROMPTS, ANSWERS)
    p = one_by_one(bert, pairs["input_ids"], pairs["token_type_ids"]).sigmoid()[:, 2]
    assert list(load_score(f"{bert}#kind")(PROMPTS, ANSWERS)) == pytest.approx((p / (1 - p)).log().tolist(), abs=1e-5)


def test_a_label_must_be_named_where_there_are_several(bert, llama) -> None:
    with pytest.raises(ScoreError, match=r"bert has several labels: write .*#LABEL, with one of rude, plain, kind"):
        load_score(str(bert))
    with pytest.raises(ScoreError, match="no label 'nice'"):
        load_score(f"{bert}#nice")
    with pytest.raises(ScoreError, match="one output only: leave out #kind"):
        load_score(f"{llama}#kind")


def test_the_beaver_models_are_read_as_they_are_stored(llama) -> None:
    """PKU-Alignment's LlamaModelForScore: a Llama whose head is called score_head."""
    expected = list(load_score(str(llama), template=TEMPLATE)(PROMPTS, ANSWERS))
    state = load_file(llama / "model.safetensors")
    state["score_head.weight"] = state.pop("score.weight")
    save_file(state, llama / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((llama / "config.json").read_text())
    config |= {"architectures": ["LlamaModelForScore"], "score_dim": 1}
    for name in ("id2label", "label2id", "num_labels"):
        config.pop(name, None)
    (llama / "config.json").write_text(json.dumps(config))
    score = load_score(str(llama), template=TEMPLATE)
    assert list(score(PROMPTS, ANSWERS)) == pytest.approx(expected, abs=1e-6)


def test_a_model_without_a_head_is_no_score(checkpoint) -> None:
    with pytest.raises(ScoreError, match=r"is not a sequence-classification model: it lacks score\.weight"):
        load_score(str(checkpoint("qwen2")))


def test_a_text_that_is_too_long_is_named(llama) -> None:
    score = load_score(str(llama), template=TEMPLATE)
    with pytest.raises(ScoreError, match=r"llama-reward reads at most 32 tokens, .* 'how do i cook rice' .* has 48"):
        score(PROMPTS[:1], ["wait " * 37])


def test_the_positions_of_the_padding_are_no_room_for_text(tmp_path) -> None:
    """RoBERTa's first position is the one behind its padding id: of 34, two are lost."""
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=34, type_vocab_size=2, pad_token_id=1, num_labels=1,
    )  # fmt: skip
    made = tokenizer(False)
    made.pad_token = WORDS[1]
    score = load_score(str(saved(RobertaForSequenceClassification(config), made, tmp_path / "roberta")))
    assert len(score(["how"], ["wait " * 28])) == 1  # 32 tokens with those around them
    with pytest.raises(ScoreError, match=r"roberta reads at most 32 tokens, and .* has 33"):
        score(["how"], ["wait " * 29])


@pytest.mark.parametrize("device", ["foo", "meta", "cuda"])
def test_a_device_that_is_not_there_is_one_line(llama, monkeypatch, device) -> None:
    monkeypatch.setattr(torch.cuda, "_lazy_init", no_cuda)
    with pytest.raises(
        OptionError, match=f"--score-device is '{device}', which cannot be used here .*; begin with cpu"
    ) as said:
        load_score(str(llama), template=TEMPLATE, device=device)
    assert "\n" not in str(said.value)


def no_cuda() -> None:
    raise AssertionError("Torch not compiled with CUDA enabled")


@pytest.mark.parametrize(
    ("spec", "template", "said"),
    [
        ("no-such-folder", None, "there is no score 'no-such-folder': --score takes module:function"),
        ("someone/nothing", None, "the score someone/nothing cannot be loaded"),
        ("./nofolder", None, "the score ./nofolder cannot be loaded: there is no folder ./nofolder"),
        ("../no/folder", None, "there is no folder ../no/folder"),
        ("~/nofolder", None, "there is no folder ~/nofolder"),
        ("LLAMA", "{answer}", r"--score-template has the fields \['answer'\]"),
        ("LLAMA", "{prompt} {answer", "--score-template is not a template"),
        ("LLAMA", "{prompt} {} {answer}", "--score-template has the fields"),
    ],
)
def test_what_is_no_score_is_one_line(llama, monkeypatch, spec, template, said) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ScoreError, match=said) as error:
        load_score(spec.replace("LLAMA", str(llama)), template=template)
    assert "\n" not in str(error.value)


def test_a_model_is_known_by_its_files(llama) -> None:
    score = load_score(str(llama), template=TEMPLATE)
    assert score.fingerprint == fingerprint(llama)


def test_a_model_of_the_hub_is_known_by_the_commit_that_was_loaded(llama, cached) -> None:
    cached("somebody/reward", llama, revision="a" * 40)
    score = load_score("somebody/reward", template=TEMPLATE)
    cached("somebody/reward", llama, revision="b" * 40)
    assert score.fingerprint == "a" * 40


def test_a_model_and_a_function_together(llama) -> None:
    combined = Combined([(2.0, load_score(str(llama), template=TEMPLATE)), (-1.0, load_score("demo"))])
    scored = combined.detail(PROMPTS, ANSWERS)
    one, other = scored.each.values()
    assert scored.combined == pytest.approx([2 * a - b for a, b in zip(one, other, strict=True)])
