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
    AutoConfig,
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
from mara_deploy.scores.base import Combined, ScoreError, WeightedScore
from mara_deploy.scores.load import load_score
from mara_runtime.errors import OptionError

TEXT = "[PAD] [UNK] [CLS] [SEP] <s> </s> user assistant : how do i cook rice wash it gently and wait go away"
WORDS = TEXT.split()
LABELS = ("rude", "plain", "kind")
PROMPTS = ["how do i cook rice", "how", "wait wait wait"]
ANSWERS = ["wash it gently and wait", "go away", "wait"]
TEMPLATE = "user : {prompt} assistant : {answer} </s>"
TINY = {"vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}


def tokenizer(decoder: bool, chat: str | None = None) -> Any:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if decoder:
        words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 4)])
        special = {"eos_token": "</s>", "bos_token": "<s>"}
    else:
        words.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        special = {"pad_token": "[PAD]"}
    fast = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", **special)
    fast.chat_template = chat
    return fast


def saved(model: Any, tokenizer: Any, folder: Path) -> Path:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)  # so that texts differ in their scores
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def llama(tmp_path) -> Path:
    """A reward model on a decoder, as most are; its tokenizer has no padding token."""
    torch.manual_seed(0)
    config = LlamaConfig(**TINY, num_hidden_layers=2, num_labels=1, max_position_embeddings=32, pad_token_id=None)
    return saved(LlamaForSequenceClassification(config), tokenizer(True), tmp_path / "llama-reward")


@pytest.fixture
def bert(tmp_path) -> Path:
    """A classifier with three labels on an encoder."""
    torch.manual_seed(0)
    labels = {"id2label": dict(enumerate(LABELS)), "label2id": {label: i for i, label in enumerate(LABELS)}}
    config = BertConfig(**TINY, num_hidden_layers=2, max_position_embeddings=32, **labels)
    return saved(BertForSequenceClassification(config), tokenizer(False), tmp_path / "bert")


def edit_config(folder: Path, **changes: Any) -> None:
    """Change config.json; None removes a key."""
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


@torch.no_grad()
def logits_one_by_one(folder: Path, ids: list[list[int]], segments: list[list[int]] | None = None) -> torch.Tensor:
    """(N, labels) of unpadded texts."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    rows = []
    for i, text in enumerate(ids):
        kind = {} if segments is None else {"token_type_ids": torch.tensor([segments[i]])}
        rows.append(model(input_ids=torch.tensor([text]), **kind).logits[0])
    return torch.stack(rows)


def of_texts(folder: Path, texts: list[str]) -> list[float]:
    return logits_one_by_one(folder, tokenizer(True)(texts)["input_ids"])[:, 0].tolist()


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_reward_model_reads_its_template(llama, batch_size) -> None:
    """In batches of texts of different lengths, whose last token is also the padding token."""
    score = load_score(str(llama), template=TEMPLATE, batch_size=batch_size)
    expected = of_texts(llama, [TEMPLATE.format(prompt=p, answer=a) for p, a in zip(PROMPTS, ANSWERS, strict=True)])
    assert list(score(PROMPTS, ANSWERS)) == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 0.01
    assert score.name == "llama-reward"
    assert score.fingerprint == fingerprint(llama)


def test_without_a_template_the_chat_template_adds_all_special_tokens(llama) -> None:
    chat = "{% for m in messages %}<s> {{ m['role'] }} : {{ m['content'] }} {% endfor %}"
    tokenizer(True, chat).save_pretrained(llama)
    texts = [f"user : {p} <s> assistant : {a}" for p, a in zip(PROMPTS, ANSWERS, strict=True)]  # and <s> before it
    assert list(load_score(str(llama))(PROMPTS, ANSWERS)) == pytest.approx(of_texts(llama, texts), abs=1e-5)


def test_the_chat_template_reads_conversations_and_nothing_else_does(llama) -> None:
    chat = "{% for m in messages %}<s> {{ m['role'] }} : {{ m['content'] }} {% endfor %}"
    conversation = [{"role": "user", "content": "how"}, {"role": "assistant", "content": "wait"},
                    {"role": "user", "content": "wait wait"}]  # fmt: skip
    with pytest.raises(ScoreError, match=r"llama-reward reads a prompt as one text, and .*'how'.* is a conversation"):
        load_score(str(llama))([conversation], ["go away"])
    tokenizer(True, chat).save_pretrained(llama)
    expected = of_texts(llama, ["user : how <s> assistant : wait <s> user : wait wait <s> assistant : go away"])
    assert list(load_score(str(llama))([conversation], ["go away"])) == pytest.approx(expected, abs=1e-5)


SIZES = {"vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2,
         "num_hidden_layers": 2, "num_labels": 1, "max_position_embeddings": 32, "ffn_dim": 32,
         "word_embed_proj_dim": 16, "pad_token_id": 0, "type_vocab_size": 1}  # fmt: skip
"""of the families below; each takes those that it has"""


@pytest.mark.parametrize("family", ["gpt_neox", "opt", "bloom", "fnet", "roberta"])
def test_a_model_gets_only_what_its_forward_pass_takes(tmp_path, family) -> None:
    """The tokenizer gives token types, of which these models have none or one; FNet has no attention mask either."""
    torch.manual_seed(0)
    known = AutoConfig.for_model(family)
    sizes = {
        name: size
        for name, size in SIZES.items()
        if name in {**known.to_dict(), **known.attribute_map, "num_labels": 1}
    }
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(family, **sizes))
    folder = saved(model, tokenizer(False), tmp_path / family)
    ids = tokenizer(False)(PROMPTS, ANSWERS)["input_ids"]
    score = Combined([WeightedScore(load_score(str(folder), batch_size=3))])
    assert score.room(PROMPTS) == (None if family == "bloom" else score.room(PROMPTS[:1]))
    assert score(PROMPTS, ANSWERS) == pytest.approx(logits_one_by_one(folder, ids)[:, 0].tolist(), abs=1e-5)


def test_whatever_fails_in_a_model_is_one_line_before_the_first_answer(llama, monkeypatch) -> None:
    """Its chat template, its forward pass, a prompt that it cannot read; then the room is what an answer can have."""
    score = Combined([WeightedScore(load_score(str(llama)))])
    assert score.room(["how", "how " * 20]) == 32 - len(tokenizer(True)(["how " * 20], ["."])["input_ids"][0]) + 1
    with pytest.raises(ScoreError, match=r"llama-reward reads at most 32 tokens; .* has 41: remove it"):
        score.room(["how", "how " * 40])
    monkeypatch.setattr(LlamaForSequenceClassification, "forward", lambda self, input_ids: input_ids[99])
    with pytest.raises(ScoreError, match="the score llama-reward failed with IndexError: index 99"):
        Combined([WeightedScore(load_score(str(llama)))])(PROMPTS, ANSWERS)
    tokenizer(True, "{{ raise_exception('no\nanswers') }}").save_pretrained(llama)
    with pytest.raises(ScoreError, match=r"^the score llama-reward failed with TemplateError: no answers"):
        Combined([WeightedScore(load_score(str(llama)))]).room(PROMPTS)
    edit_config(llama, hidden_size=0)
    with pytest.raises(ScoreError, match=f"^the score {llama} cannot be loaded: "):
        load_score(str(llama))


def test_a_classifier_gives_the_log_odds_of_a_label_of_a_pair(bert) -> None:
    """Of a softmax over the labels, or of a sigmoid for multi-label models."""
    pairs = tokenizer(False)(PROMPTS, ANSWERS, return_token_type_ids=True)
    logits = logits_one_by_one(bert, pairs["input_ids"], pairs["token_type_ids"])
    for kind, batch_size, p in (("single", 8, logits.softmax(1)[:, 2]), ("multi", 1, logits.sigmoid()[:, 2])):
        edit_config(bert, problem_type=f"{kind}_label_classification")
        score = load_score(f"{bert}#kind", batch_size=batch_size)
        assert list(score(PROMPTS, ANSWERS)) == pytest.approx((p / (1 - p)).log().tolist(), abs=1e-5)
        assert score.name == "bert#kind"


def test_the_beaver_models_load_as_stored(llama) -> None:
    """PKU-Alignment's LlamaModelForScore: a Llama whose head is called score_head."""
    expected = list(load_score(str(llama), template=TEMPLATE)(PROMPTS, ANSWERS))
    state = load_file(llama / "model.safetensors")
    state["score_head.weight"] = state.pop("score.weight")
    save_file(state, llama / "model.safetensors", metadata={"format": "pt"})
    gone = dict.fromkeys(("id2label", "label2id", "num_labels"))
    edit_config(llama, architectures=["LlamaModelForScore"], score_dim=1, **gone)
    score = load_score(str(llama), template=TEMPLATE)
    assert list(score(PROMPTS, ANSWERS)) == pytest.approx(expected, abs=1e-6)


def test_the_length_limit(llama, tmp_path) -> None:
    """RoBERTa's positions start after its padding id: of 34, two are lost."""
    with pytest.raises(ScoreError, match=r"llama-reward reads at most 32 tokens.* 'how do i cook rice' .* 48"):
        load_score(str(llama), template=TEMPLATE)(PROMPTS[:1], ["wait " * 37])
    torch.manual_seed(0)
    positions = {"max_position_embeddings": 34, "type_vocab_size": 2, "pad_token_id": 1}
    config = RobertaConfig(**TINY, num_hidden_layers=1, num_labels=1, **positions)
    padded = tokenizer(False)
    padded.pad_token = WORDS[1]
    score = load_score(str(saved(RobertaForSequenceClassification(config), padded, tmp_path / "roberta")))
    assert len(score(["how"], ["wait " * 28])) == 1  # 32 tokens with the special ones
    with pytest.raises(ScoreError, match=r"roberta reads at most 32 tokens.* 33"):
        score(["how"], ["wait " * 29])


def test_a_device_that_is_not_available(llama, monkeypatch) -> None:
    def no_cuda() -> None:
        raise AssertionError("Torch not compiled with CUDA enabled")

    monkeypatch.setattr(torch.cuda, "_lazy_init", no_cuda)
    for device in ("foo", "meta", "cuda"):
        with pytest.raises(OptionError, match=f"--score-device is '{device}'.*use auto or cpu") as error:
            load_score(str(llama), template=TEMPLATE, device=device)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("spec", "template", "named"),
    [
        ("no-such-folder", None, "there is no score 'no-such-folder': --score takes module:function"),
        ("someone/nothing", None, "the score someone/nothing cannot be loaded"),
        ("~/nofolder", None, "there is no folder ~/nofolder"),
        ("LLAMA", "{answer}", r"--score-template has the fields \['answer'\]"),
        ("LLAMA", "{prompt} {answer", "--score-template is not a valid template"),
        ("LLAMA#kind", None, "single output: omit #kind"),
        ("BERT", None, r"bert has several labels: pass .*#LABEL with one of rude, plain, kind"),
        ("BERT#nice", None, "no label 'nice'"),
        ("QWEN2", None, r"not a sequence-classification model: missing weights score\.weight"),
    ],
)
def test_a_model_that_cannot_be_a_score_is_one_line(llama, bert, checkpoint, monkeypatch, spec, template, named):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, folder in (("LLAMA", llama), ("BERT", bert), ("QWEN2", checkpoint("qwen2"))):
        spec = spec.replace(name, str(folder))
    with pytest.raises(ScoreError, match=named) as error:
        load_score(spec, template=template)
    assert "\n" not in str(error.value)


def test_the_fingerprint_of_a_hub_model_is_the_commit_that_was_loaded(llama, cached) -> None:
    cached("somebody/reward", llama, revision="a" * 40)
    score = load_score("somebody/reward", template=TEMPLATE)
    cached("somebody/reward", llama, revision="b" * 40)
    assert score.fingerprint == "a" * 40
