"""Another checkpoint as a baseline, decoded by PyTorch: for example an LLM tuned by RLHF or DPO."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mara_deploy.evaluate.answers import Answer, PromptFormat, answer_seed
from mara_deploy.files import fingerprint
from mara_deploy.prompts import Asked, encode
from mara_export.errors import ModelError
from mara_export.hf.checkpoint import eos_token_ids, load_model, read_config
from mara_export.hf.sources import resolve_model
from mara_export.hf.tokenizer import load_tokenizer
from mara_runtime.config import DecodeConfig
from mara_runtime.errors import PromptError


class CheckpointAnswers:
    """Answers of a Hugging Face causal LM with its own tokenizer and chat template, greedy or sampled.

    Decodes like the bundle's plain baselines: every end-of-sequence id of the generation config stops it, penalties and
    other settings of that config are ignored, and sampling applies top-k, then top-p, then the temperature.
    Runs on a GPU, if PyTorch has one, in the checkpoint's precision; else on the CPU in float32.

    Raises ModelError for a checkpoint that cannot be loaded, PromptError for a prompt that its template rejects.
    """

    def __init__(
        self, model: str, config: DecodeConfig, prompt_format: PromptFormat, ignore_weights: Sequence[str] = ()
    ) -> None:
        self._source, self._ignored = resolve_model(model), ignore_weights
        self._config, self._format = config, prompt_format
        self.name = self._source.name
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model: Any = None
        self._model_config = read_config(self._source)
        self._context = getattr(self._model_config, "max_position_embeddings", None) or 1 << 30  # tokens
        self._tokenizer: Any = load_tokenizer(self._source)
        if self._tokenizer is None:
            raise ModelError(f"{self.name} has no tokenizer: add its tokenizer.json")

    @cached_property  # hashes the weights
    def settings(self) -> dict[str, Any]:
        """See `AnswerSource`."""
        config = self._config
        return {
            "checkpoint": self.name,
            "files": self._source.revision or fingerprint(self._source.folder),
            "device": self._device,
            "raw": self._format.raw or not self._tokenizer.chat_template,
            "template": dict(self._format.template or {}),
            "max_new_tokens": config.max_new_tokens,
            "stop": list(config.stop),
            "sample": config.sample,
            **(
                {name: getattr(config, name) for name in ("top_k", "top_p", "temperature", "seed")}
                if config.sample
                else {}
            ),
        }

    def close(self) -> None:
        """See `AnswerSource`."""
        self._model = None

    def check(self, prompt: Asked) -> None:
        """See `AnswerSource`."""
        self._encode(prompt)

    def __call__(self, prompts: Sequence[Asked]) -> Iterator[tuple[int, list[Answer]]]:
        """See `AnswerSource`: one at a time."""
        for index, prompt in enumerate(prompts):
            yield index, [self._answer(prompt)]

    @torch.no_grad()
    def _answer(self, prompt: Asked) -> Answer:
        self._model = self._model or self._load()
        tokenizer, config = self._tokenizer, self._config
        eos = eos_token_ids(self._model, tokenizer)
        ids = torch.tensor([self._encode(prompt)], device=self._device)  # (1, S)
        with torch.random.fork_rng():
            torch.manual_seed(answer_seed(config.seed, prompt))
            output = self._model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=GenerationConfig(  # type: ignore[no-untyped-call]
                    do_sample=config.sample,
                    max_new_tokens=min(config.max_new_tokens, self._context - ids.shape[1]),
                    eos_token_id=list(eos) or None,
                    pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (*eos, 0)[0],
                    stop_strings=list(config.stop) or None,
                    **({"top_k": 0} if config.sample else {}),  # transformers applies its own filters in another order
                ),
                use_model_defaults=False,  # else the checkpoint's penalties apply
                logits_processor=_filters(config) if config.sample else None,
                tokenizer=tokenizer,
            )
        new = output[0, ids.shape[1] :].tolist()
        # like the runtime's tokenizer, keep spaces before punctuation
        text = tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        ends = [at for at in (text.find(stop) for stop in config.stop) if at >= 0]
        stopped = bool(ends) or new[-1] in eos
        return Answer(text[: min(ends)] if ends else text, len(new), "stop" if stopped else "length")

    def _load(self) -> Any:
        dtype = torch.float32 if self._device == "cpu" else self._model_config.dtype or torch.float32
        return load_model(self._source, "sdpa", dtype, ignore_weights=self._ignored).to(self._device)

    def _encode(self, prompt: Asked) -> list[int]:
        ids = encode(prompt, self._tokenizer, self.name, raw=self._format.raw, template=self._format.template)
        if len(ids) >= self._context:
            raise PromptError(
                f"the prompt has {len(ids)} tokens; {self.name} has a context of {self._context} for prompt and answer"
            )
        return ids


def _filters(config: DecodeConfig) -> LogitsProcessorList:
    top_k, top_p = config.candidates
    filters = [TopKLogitsWarper(top_k), TopPLogitsWarper(top_p)]
    if config.temperature != 1.0:
        filters.append(TemperatureLogitsWarper(config.temperature))
    return LogitsProcessorList(filters)
