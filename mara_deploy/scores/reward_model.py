"""A Hugging Face sequence-classification or reward model as a score."""

from __future__ import annotations

import string
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from mara_deploy.files import fingerprint
from mara_deploy.scores.base import ScoreError
from mara_export.errors import ModelError
from mara_export.hf.checkpoint import from_pretrained, read_config
from mara_export.hf.sources import ModelSource, is_hub_id, local_path, resolve_model
from mara_export.hf.tokenizer import load_tokenizer
from mara_runtime.errors import OptionError

_SAFE_RLHF_HEAD = {r"^score_head\.": "score."}
"""PKU-Alignment's reward and cost models (`LlamaModelForScore`) are Llama classifiers whose head has another name."""
_FIELDS = {"prompt", "answer"}


class RewardModel:
    """Callable (prompts, answers) → floats: the model's one output, or the log-odds of one of its labels.

    Where a text may have several labels, a label's log-odds are its logit. The answer stands in the model's template,
    or its tokenizer's chat template, or else beside the prompt as the second text of a pair.
    """

    def __init__(
        self,
        name: str,
        source: ModelSource,
        model: Any,
        tokenizer: Any,
        label: int | None,
        template: str | None,
        batch_size: int,
        max_tokens: int | None,
    ) -> None:
        self.name = name
        self._source = source
        self._model, self._tokenizer, self._label = model, tokenizer, label
        self._template, self._batch_size = template, batch_size
        self._max_tokens = max_tokens or _room(model)
        # log-odds are those of a softmax where a text has one of the labels; else outputs stand alone
        self._one_of_all = model.config.problem_type in (None, "single_label_classification")
        # A head named `score` reads the last token: transformers looks for it by the padding id, which may be a token
        # of the text too. Padded on the left, with an id that is no token's, the last is the last.
        self._reads_last_token = hasattr(model, "score")
        if self._reads_last_token:
            tokenizer.padding_side = "left"
            model.config.pad_token_id = -1
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)

    @cached_property  # it reads the weights through
    def fingerprint(self) -> str:
        """See `LoadedScore`: the commit of a Hub model, else checksums of the folder."""
        return self._source.revision or fingerprint(self._source.folder)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        """(N,) scores, `batch_size` answers at a time, in float32. Raises ScoreError for a text that is too long."""
        values: list[float] = []
        for start in range(0, len(prompts), self._batch_size):
            part = slice(start, start + self._batch_size)
            inputs = self._encode(prompts[part], answers[part]).to(self._model.device)
            logits = self._model(**inputs).logits.float()  # (B, labels)
            values += self._values(logits).tolist()
        return values

    def _encode(self, prompts: Sequence[str], answers: Sequence[str]) -> Any:
        options: dict[str, Any] = {"padding": True, "return_tensors": "pt"}
        if self._template is not None:
            texts = [_fill(self._template, p, a) for p, a in zip(prompts, answers, strict=True)]
            inputs = self._tokenizer(texts, **options)
        elif self._tokenizer.chat_template:
            chats = [
                [{"role": "user", "content": p}, {"role": "assistant", "content": a}]
                for p, a in zip(prompts, answers, strict=True)
            ]
            texts = [self._tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
            inputs = self._tokenizer(texts, add_special_tokens=False, **options)  # the template holds them
        else:
            inputs = self._tokenizer(list(prompts), list(answers), **options)
        lengths = inputs["attention_mask"].sum(1).tolist()
        for prompt, length in zip(prompts, lengths, strict=True):
            if self._max_tokens is not None and length > self._max_tokens:
                raise ScoreError(
                    f"the score {self.name} reads at most {self._max_tokens} tokens, and the prompt {prompt[:80]!r} "
                    f"with its answer has {length}: lower --max-new-tokens"
                )
        if self._reads_last_token:
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        return inputs

    def _values(self, logits: Tensor) -> Tensor:
        if self._label is None:
            return logits[:, 0]
        if not self._one_of_all:
            return logits[:, self._label]
        others = [i for i in range(logits.shape[1]) if i != self._label]
        return logits[:, self._label] - logits[:, others].logsumexp(1)


def load(spec: str, template: str | None, device: str, batch_size: int, max_tokens: int | None) -> RewardModel:
    """Load a model for `mara_deploy.scores.base.load_score`.

    spec: a folder or Hub id, followed by `#LABEL` if the model has several labels; template: a text with {prompt} and
    {answer}, None for the tokenizer's chat template; device: as torch names it, in float32 on a CPU, else as stored;
    batch_size: texts at a time, ≥ 1; max_tokens: refuse longer texts, None for the model's own limit.
    Raises ScoreError, OptionError for the device.
    """
    where, _, label = spec.partition("#")
    usable_device("--score-device", device, "cpu")
    if template is not None:
        _check_template(template)
    try:
        return _load(spec, where, label, template, device, batch_size, max_tokens)
    except ModelError as error:
        raise ScoreError(f"the score {where} cannot be loaded: {error}") from error


def usable_device(flag: str, name: str, others: str) -> torch.device:
    """The device of that name. Raises OptionError, which names the `others`, where nothing can be computed there.

    The wording also fits a resumed run, which stays on its device.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise OptionError(f"{flag} is {name!r}, which cannot be used here ({reason}); begin with {others}") from None
    return device


def _load(
    spec: str, where: str, label: str, template: str | None, device: str, batch_size: int, max_tokens: int | None
) -> RewardModel:
    folder = local_path(where)
    if folder is None and where.startswith((".", "/", "~")):
        raise ScoreError(f"the score {spec} cannot be loaded: there is no folder {where}")
    if (folder is None or not folder.is_dir()) and not is_hub_id(where):
        raise ScoreError(
            f"there is no score {spec!r}: --score takes module:function, the folder or Hub id of a model, or `demo`"
        )
    source = resolve_model(where)
    config = read_config(source)
    model = _classifier(source, config, device)
    tokenizer = load_tokenizer(source)
    if tokenizer is None:
        raise ScoreError(f"the score {source.name} has no tokenizer: add its tokenizer.json")
    labels = {str(name): index for index, name in model.config.id2label.items()}
    if model.config.num_labels == 1:
        if label:
            raise ScoreError(f"the score {source.name} has one output only: leave out #{label}")
        index = None
    elif label not in labels:
        found = f"no label {label!r}" if label else "several labels"
        raise ScoreError(f"the score {source.name} has {found}: write {where}#LABEL, with one of {', '.join(labels)}")
    else:
        index = labels[label]
    name = source.name + (f"#{label}" if label else "")
    return RewardModel(name, source, model, tokenizer, index, template, batch_size, max_tokens)


def _room(model: Any) -> int | None:
    """Longest text, in tokens; None: any length. RoBERTa counts positions from the one after the padding's, whose
    embedding has a `padding_idx`.
    """
    room: int | None = getattr(model.config, "max_position_embeddings", None)
    for name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        if padding is not None and name.endswith("position_embeddings"):
            room = module.num_embeddings - padding - 1
    return room


def _classifier(source: ModelSource, config: Any, device: str) -> Any:
    """The model, refused where weights are missing, as transformers would fill them in at random."""
    options: dict[str, Any] = {"output_loading_info": True, "use_safetensors": True}
    if any(name.endswith("ForScore") for name in config.architectures or []):
        options |= {"key_mapping": _SAFE_RLHF_HEAD}
        config.num_labels = getattr(config, "score_dim", 1)
    dtype = torch.float32 if torch.device(device).type == "cpu" else "auto"
    model, loading = from_pretrained(AutoModelForSequenceClassification, source, config=config, dtype=dtype, **options)
    if missing := sorted(loading["missing_keys"]):
        raise ScoreError(
            f"{source.name} is not a sequence-classification model: it lacks {', '.join(missing[:3])}"
            + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        )
    return model.eval().to(device)


def _check_template(template: str) -> None:
    try:
        fields = {field for _, field, _, _ in string.Formatter().parse(template) if field is not None}
    except ValueError as error:
        raise ScoreError(f"--score-template is not a template ({error}): write {{{{ for a brace") from None
    if fields != _FIELDS:
        raise ScoreError(f"--score-template has the fields {sorted(fields)}; it must have {{prompt}} and {{answer}}")


def _fill(template: str, prompt: str, answer: str) -> str:
    return template.format(prompt=prompt, answer=answer)
