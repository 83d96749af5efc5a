"""What an agent is trained on: a frozen LLM, prompts and a score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mara_deploy.devices import torch_device
from mara_deploy.prompts import Prompt, encode
from mara_deploy.scores.base import Combined, ScoreValues
from mara_deploy.train.config import TrainConfig
from mara_deploy.train.environment import Environment, Episode
from mara_deploy.train.packed import ATTENTION, PackedLM
from mara_deploy.train.policy import Policy
from mara_export.errors import ModelError
from mara_export.hf.checkpoint import eos_token_ids, fingerprint, load_model, read_config
from mara_export.hf.families import check_supported
from mara_export.hf.sources import ModelSource
from mara_export.hf.tokenizer import load_tokenizer, template_checksum
from mara_runtime.errors import PromptError
from mara_runtime.training import Training


@dataclass(frozen=True)
class Rollouts:
    """Answers to some prompts, and their scores."""

    prompts: tuple[Prompt, ...]
    episodes: list[Episode]
    texts: list[str]
    """without special tokens"""
    scores: ScoreValues


@dataclass(frozen=True)
class TrainingTask:
    """Answers prompts and scores the answers."""

    environment: Environment
    tokenizer: Any
    """of Hugging Face"""
    prompts: Sequence[Prompt]
    """distinct"""
    tokens: Sequence[Sequence[int]]
    """their token ids, including the generation prompt"""
    score: Combined
    training: Training | None = None
    """what the agent's file records; without counters"""

    @property
    def hidden_size(self) -> int:
        """D of the LLM."""
        return self.environment.lm.hidden_size

    def answer(
        self,
        indices: NDArray[np.int64],
        policy: Policy,
        rng: np.random.Generator | None,
        fallback: str = "last",
        record: bool = True,
    ) -> Rollouts:
        """Answer the prompts at `indices` in one batch, and score the answers; see `Environment.rollout`."""
        prompts = tuple(self.prompts[i] for i in indices)
        tokens = [self.tokens[i] for i in indices]
        episodes = self.environment.rollout(tokens, policy, rng, fallback=fallback, record=record)
        texts = self.tokenizer.batch_decode(
            [episode.token_ids for episode in episodes],
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,  # like the runtime's tokenizer, keep spaces before punctuation
        )
        columns = {name: [prompt.columns[name] for prompt in prompts] for name in self.score.columns}
        return Rollouts(prompts, episodes, texts, self.score.detail([p.asked for p in prompts], texts, **columns))


def open_task(
    source: ModelSource,
    prompts: Sequence[Prompt],
    score: Combined,
    config: TrainConfig,
    *,
    device: str = "auto",
    dtype: str = "auto",
    template: Mapping[str, Any] | None = None,
    ignore_weights: Sequence[str] = (),
) -> TrainingTask:
    """Load the LLM and tokenise the prompts.

    device: torch device, auto for CUDA if available; dtype: of the LLM, auto for bfloat16 on CUDA and float32 on a CPU;
    template: variables for the chat template. Without a chat template, prompts are plain text.
    ignore_weights: patterns of surplus weights to leave out.
    Raises ModelError, PromptError for a prompt that leaves no room for an answer, OptionError.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    on = torch_device("--device", device, "auto or cpu")
    context = check_supported(read_config(source), source.name, None)
    tokenizer = load_tokenizer(source)
    if tokenizer is None:
        raise ModelError(f"{source.name} has no tokenizer, which training requires: add its tokenizer.json")
    tokens = [encode(prompt.asked, tokenizer, source.name, template=template) for prompt in prompts]
    for prompt, ids in zip(prompts, tokens, strict=True):
        if len(ids) + config.max_new_tokens > context:
            raise PromptError(
                f"a prompt of {len(ids)} tokens and an answer of {config.max_new_tokens} exceed the context of "
                f"{source.name}, {context} ({prompt.text[:60]!r}): lower --max-new-tokens, or remove the prompt"
            )
    if dtype == "auto":
        dtype = "bfloat16" if on.type == "cuda" else "float32"
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    model = load_model(source, ATTENTION, dtypes[dtype], ignore_weights=ignore_weights).to(on)
    eos = frozenset(eos_token_ids(model, tokenizer))
    environment = Environment(PackedLM(model), eos, config.top_k, config.top_p, config.max_new_tokens)
    training = Training(
        model=source.name,
        architecture=model.config.model_type,
        weights=fingerprint(model),
        chat_template=template_checksum(tokenizer),
        template=dict(template or {}),
        top_k=config.top_k,
        top_p=config.top_p,
        max_new_tokens=config.max_new_tokens,
        score=score.name,
        episodes=0,
        updates=0,
        transitions=0,
    )
    return TrainingTask(environment, tokenizer, prompts, tokens, score, training)
