"""What an agent is trained on: a frozen LLM, prompts, and a score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mara_deploy.prompts import encode
from mara_deploy.scores.base import Combined, Scored
from mara_deploy.scores.reward_model import usable_device
from mara_deploy.train.config import TrainConfig
from mara_deploy.train.environment import Environment, Episode, Policy
from mara_deploy.train.packed import ATTENTION, PackedLM
from mara_export.errors import ModelError
from mara_export.hf.checkpoint import eos_token_ids, load_model, read_config
from mara_export.hf.families import check_supported
from mara_export.hf.sources import ModelSource
from mara_export.hf.tokenizer import load_tokenizer
from mara_runtime.errors import PromptError


@dataclass(frozen=True)
class Answers:
    """Answers to prompts, and their scores."""

    prompts: tuple[str, ...]
    episodes: list[Episode]
    texts: list[str]
    """without special tokens"""
    scored: Scored


class Task:
    """Answers prompts and scores the answers.

    prompts: different user messages; tokens: their token ids, ready for an answer.
    """

    def __init__(
        self,
        environment: Environment,
        tokenizer: Any,
        prompts: Sequence[str],
        tokens: Sequence[Sequence[int]],
        score: Combined,
    ) -> None:
        self.environment, self.prompts, self.score = environment, tuple(prompts), score
        self.tokens = tokens
        self._tokenizer = tokenizer

    @property
    def hidden_size(self) -> int:
        """D of the LLM."""
        return self.environment.lm.hidden_size

    def within(self, environment: Environment) -> Task:
        """The same prompts and score in another environment."""
        return Task(environment, self._tokenizer, self.prompts, self.tokens, self.score)

    def answer(
        self,
        chosen: NDArray[np.int64],
        policy: Policy,
        rng: np.random.Generator | None,
        fallback: str = "last",
        record: bool = True,
    ) -> Answers:
        """Answer the prompts at the indices `chosen`, all at once; see `Environment.rollout`."""
        prompts = tuple(self.prompts[i] for i in chosen)
        tokens = [self.tokens[i] for i in chosen]
        episodes = self.environment.rollout(tokens, policy, rng, fallback=fallback, record=record)
        texts = self._tokenizer.batch_decode(
            [e.token_ids for e in episodes],
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,  # the runtime does not tidy the spaces before punctuation either
        )
        return Answers(prompts, episodes, texts, self.score.detail(prompts, texts))


def open_task(
    source: ModelSource,
    prompts: Sequence[str],
    score: Combined,
    config: TrainConfig,
    *,
    device: str = "auto",
    dtype: str = "auto",
    template: Mapping[str, Any] | None = None,
) -> Task:
    """Load the LLM and tokenise the prompts.

    device: auto takes a CUDA device if there is one; dtype: of the LLM, auto is bfloat16 there and float32 on a CPU;
    template: variables for the chat template. Without a chat template prompts are plain text.
    Raises ModelError, PromptError for a prompt that leaves no room for an answer, OptionError.
    """
    on = _device(device)
    context = check_supported(read_config(source), source.name, None)
    tokenizer = load_tokenizer(source)
    if tokenizer is None:
        raise ModelError(f"{source.name} has no tokenizer, which training needs: add its tokenizer.json")
    tokens = [encode(prompt, tokenizer, source.name, template=template) for prompt in prompts]
    for prompt, ids in zip(prompts, tokens, strict=True):
        if len(ids) + config.max_new_tokens > context:
            raise PromptError(
                f"a prompt of {len(ids)} tokens and an answer of {config.max_new_tokens} exceed the {context} that "
                f"{source.name} holds ({prompt[:60]!r}): lower --max-new-tokens, or remove the prompt"
            )
    kind = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    chosen = kind[dtype] if dtype != "auto" else torch.bfloat16 if on.type == "cuda" else torch.float32
    model = load_model(source, ATTENTION, chosen).to(on)
    eos = frozenset(eos_token_ids(model, tokenizer))
    environment = Environment(PackedLM(model), eos, config.top_k, config.top_p, config.max_new_tokens)
    return Task(environment, tokenizer, prompts, tokens, score)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return usable_device("--device", name, "auto or cpu")
