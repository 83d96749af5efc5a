"""A Hugging Face sequence-classification or reward model as a score."""

from __future__ import annotations

import inspect
import string
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from mara_deploy.devices import torch_device
from mara_deploy.files import fingerprint
from mara_deploy.prompts import Asked, messages
from mara_deploy.scores.base import ScoreError, shown
from mara_export.errors import ModelError
from mara_export.hf.checkpoint import load_weights, read_config, read_packing
from mara_export.hf.sources import ModelSource, is_hub_id, local_path, resolve_model
from mara_export.hf.tokenizer import load_tokenizer, render_chat

_SAFE_RLHF_HEAD = {r"^score_head\.": "score."}
"""PKU-Alignment's reward and cost models (`LlamaModelForScore`) are Llama classifiers with a renamed head."""


class RewardModel:
    """Callable (prompts, answers) → floats: the model's single output, or the log-odds of one label.

    For multi-label models (`problem_type`), the log-odds of a label are its logit. The text is the filled-in template,
    or the tokenizer's chat template, which conversations need, or else the pair of prompt and answer.

    spec: a folder or Hub id, followed by `#LABEL` if the model has several labels; template: text with {prompt} and
    {answer}, None for the tokenizer's chat template; device: torch device or auto, float32 on a CPU, else the stored
    precision; batch_size: texts per pass, ≥ 1.
    Raises ScoreError, or OptionError for the device.
    """

    columns: Sequence[str] = ()
    """See `Score`."""

    def __init__(self, spec: str, template: str | None, device: str, batch_size: int) -> None:
        name, _, label = spec.partition("#")
        device = str(torch_device("--score-device", device))
        if template is not None:
            _check_template(template)
        folder = local_path(name)
        if folder is None and name.startswith((".", "/", "~")):
            raise ScoreError(f"the score {spec} cannot be loaded: there is no folder {name}")
        if (folder is None or not folder.is_dir()) and not is_hub_id(name):
            raise ScoreError(
                f"there is no score {spec!r}: --score takes module:function, the folder or Hub id of a model, or `demo`"
            )
        try:
            source = resolve_model(name)
            model = _load_classifier(source, device)
            tokenizer = load_tokenizer(source)
        except ModelError as error:
            raise ScoreError(f"the score {name} cannot be loaded: {error}") from error
        if tokenizer is None:
            raise ScoreError(f"the score {source.name} has no tokenizer: add its tokenizer.json")
        self.name = source.name + (f"#{label}" if label else "")
        self._source, self._model, self._tokenizer = source, model, tokenizer
        self._label = _label_index(model.config, label, name, source.name)
        self._template, self._max_tokens = template, _position_limit(model)
        self._arguments = set(inspect.signature(model.forward).parameters)
        # What a tokenizer returns by itself depends on the version of transformers.
        self._segments = "token_type_ids" in self._arguments and getattr(model.config, "type_vocab_size", 0) > 1
        if getattr(model.config, "type_vocab_size", 2) < 2:
            self._arguments.discard("token_type_ids")
        self._batch_size = batch_size if "attention_mask" in self._arguments else 1  # it would read the padding
        self._multi_label = model.config.problem_type not in (None, "single_label_classification")
        # Decoder heads, named `score`, read the last token, which transformers locates by the padding id. That id may
        # also be a token of the text. With padding on the left and an id that no token has, the last token is last.
        self._reads_last_token = hasattr(model, "score")
        if self._reads_last_token:
            tokenizer.padding_side = "left"
            model.config.pad_token_id = -1
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)

    @cached_property  # hashes the weights
    def fingerprint(self) -> str:
        """Identifies the weights: the commit of a Hub model, else checksums of the folder."""
        return self._source.revision or fingerprint(self._source.folder)

    def room(self, prompts: Sequence[Asked]) -> int | None:
        """Tokens that an answer to any of the prompts can have; None: no limit. Raises ScoreError if one has none."""
        parts = [prompts[start : start + 256] for start in range(0, len(prompts), 256)]
        longest = max(self._encode(part, ["."] * len(part), "remove it")[1] for part in parts)
        return self._max_tokens and self._max_tokens - longest + 1

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Asked], answers: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        """(N,) scores, computed in batches. Raises ScoreError for a text that is too long."""
        values: list[float] = []
        for start in range(0, len(prompts), self._batch_size):
            part = slice(start, start + self._batch_size)
            inputs, _ = self._encode(prompts[part], answers[part])
            logits = self._model(**inputs.to(self._model.device)).logits.float()  # (B, labels)
            values += self._values(logits).tolist()
        return values

    def _encode(
        self, prompts: Sequence[Asked], answers: Sequence[str], remedy: str = "lower --max-new-tokens"
    ) -> tuple[Any, int]:
        """The model's inputs, and the tokens of the longest text."""
        options: dict[str, Any] = {
            "padding": True,
            "return_tensors": "pt",
            "return_attention_mask": True,
            "return_token_type_ids": self._segments or None,
        }
        pairs = list(zip(prompts, answers, strict=True))
        by_chat = self._template is None and self._tokenizer.chat_template
        if not by_chat and (conversation := next((p for p in prompts if not isinstance(p, str)), None)):
            raise ScoreError(
                f"the score {self.name} reads a prompt as one text, and {shown(conversation)} is a conversation: it "
                "needs the chat template of the score's tokenizer"
            )
        if self._template is not None:
            texts = [self._template.format(prompt=prompt, answer=answer) for prompt, answer in pairs]
            inputs = self._tokenizer(texts, **options)
        elif by_chat:
            chats = [[*messages(prompt), {"role": "assistant", "content": answer}] for prompt, answer in pairs]
            texts = [render_chat(self._tokenizer, chat) for chat in chats]
            inputs = self._tokenizer(texts, add_special_tokens=False, **options)  # the template adds them
        else:
            inputs = self._tokenizer(list(prompts), list(answers), **options)
        lengths = inputs["attention_mask"].sum(1).tolist()
        for prompt, length in zip(prompts, lengths, strict=True):
            if self._max_tokens is not None and length > self._max_tokens:
                raise ScoreError(
                    f"the score {self.name} reads at most {self._max_tokens} tokens; the prompt {shown(prompt)} with "
                    f"its answer has {length}: {remedy}"
                )
        if self._reads_last_token:
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        for name in inputs.keys() - self._arguments:  # such as the token types of a tokenizer made for another model
            del inputs[name]
        return inputs, max(lengths)

    def _values(self, logits: Tensor) -> Tensor:
        """(B, labels) → (B,)."""
        if self._label is None:
            return logits[:, 0]
        if self._multi_label:
            return logits[:, self._label]
        others = [i for i in range(logits.shape[1]) if i != self._label]
        return logits[:, self._label] - logits[:, others].logsumexp(1)


def _label_index(config: Any, label: str, spec: str, name: str) -> int | None:
    """The output that `#LABEL` selects; None for a model with one output."""
    if config.num_labels == 1:
        if label:
            raise ScoreError(f"the score {name} has a single output: omit #{label}")
        return None
    labels: dict[str, int] = {str(text): index for index, text in config.id2label.items()}
    if label not in labels:
        problem = f"no label {label!r}" if label else "several labels"
        raise ScoreError(f"the score {name} has {problem}: pass {spec}#LABEL with one of {', '.join(labels)}")
    return labels[label]


def _position_limit(model: Any) -> int | None:
    """Longest text, in tokens; None: unlimited. RoBERTa's positions start after the padding id's."""
    limit: int | None = getattr(model.config, "max_position_embeddings", None)
    for name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        if padding is not None and name.endswith("position_embeddings"):
            limit = len(module.weight) - padding - 1
    return limit if limit is not None and limit > 0 else None


def _load_classifier(source: ModelSource, device: str) -> Any:
    """Load a model. Raises ScoreError for missing weights, which transformers would initialise at random."""
    config = read_config(source, whole=True)
    if (packing := read_packing(source)) is not None:
        raise ScoreError(f"{source.name} is quantised ({packing.method}), which scores are not: name one of floats")
    options: dict[str, Any] = {}
    if any(name.endswith("ForScore") for name in config.architectures or []):
        options["key_mapping"] = _SAFE_RLHF_HEAD
        config.num_labels = getattr(config, "score_dim", 1)
    dtype = torch.float32 if torch.device(device).type == "cpu" else "auto"
    model, loading = load_weights(AutoModelForSequenceClassification, source, config=config, dtype=dtype, **options)
    if missing := sorted(loading["missing_keys"]):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ScoreError(
            f"{source.name} is not a sequence-classification model: missing weights {', '.join(missing[:3])}{more}"
        )
    return model.eval().to(device)


def _check_template(template: str) -> None:
    try:
        fields = {field for _, field, _, _ in string.Formatter().parse(template) if field is not None}
    except ValueError as error:
        raise ScoreError(
            f"--score-template is not a valid template ({error}): write {{{{ for a literal brace"
        ) from None
    if fields != {"prompt", "answer"}:
        raise ScoreError(f"--score-template has the fields {sorted(fields)}; it must have {{prompt}} and {{answer}}")
