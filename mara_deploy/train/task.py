"""What an agent is trained on: a frozen LLM, prompts and a score."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mara_deploy.devices import free_bytes, torch_device
from mara_deploy.prompts import Prompt, encode
from mara_deploy.scores.base import Combined, ScoreError, ScoreValues
from mara_deploy.train.config import TrainConfig, fit
from mara_deploy.train.environment import Environment, Episode
from mara_deploy.train.packed import ATTENTION, PackedLM
from mara_deploy.train.policy import Policy
from mara_deploy.train.replay import ReplayBuffer
from mara_export.errors import ModelError
from mara_export.hf.checkpoint import eos_token_ids, load_model, read_config
from mara_export.hf.lora import read_adapter
from mara_export.hf.sources import ModelSource
from mara_export.hf.supported import check_supported
from mara_export.hf.tokenizer import load_tokenizer, template_checksum
from mara_export.hf.weights import Weights
from mara_runtime.errors import PromptError
from mara_runtime.manifest import adapted_name
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
    notify: Callable[[str], None] = lambda _: None
    """called with a message when a score is tried again"""

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
        return Rollouts(prompts, episodes, texts, scored(self.score, prompts, texts, self.notify))

    def fit(
        self, config: TrainConfig, given: Collection[str], room: int | None, disk_bytes: int
    ) -> tuple[TrainConfig, TrainingTask]:
        """Lower the settings that the user has not `given` to what model, prompts, scores and machine take.

        room: tokens of the longest answer that the scores read, None: any; disk_bytes: free space for the run.
        Raises OptionError, see `mara_deploy.train.config.fit`.
        """
        lm, lengths = self.environment.lm, [len(ids) for ids in self.tokens]
        room = min(self.environment.context - min(lengths), sys.maxsize if room is None else max(1, room // _GROWTH))
        entry = lm.sequence_bytes(max(lengths) + min(config.max_new_tokens, room), config.top_k)
        free = free_bytes(lm.device)
        config = fit(
            config,
            given,
            room=room,
            disk=disk_bytes // ReplayBuffer.bytes_per_transition(lm.hidden_size),
            sequences=config.prompts_at_once if free is None else free // 2 // entry,
        )
        return config, replace(self, environment=replace(self.environment, max_new_tokens=config.max_new_tokens))


_GROWTH = 3
"""Tokens of a score's model that a token of the LLM may become: each byte of a text that is no UTF-8 becomes three."""
_PAUSES_S = (1, 5, 25)
"""Before a score that failed for a passing reason is tried again."""


def scored(
    score: Combined, prompts: Sequence[Prompt], answers: Sequence[str], notify: Callable[[str], None]
) -> ScoreValues:
    """The scores of answers, computed again where that fails for a reason that may pass. Raises ScoreError."""
    asked = [prompt.asked for prompt in prompts]
    columns = {name: [prompt.columns[name] for prompt in prompts] for name in score.columns}
    for pause in _PAUSES_S:
        try:
            return score.detail(asked, answers, **columns)
        except ScoreError as error:
            if not error.transient:
                raise
            notify(f"{error}; trying again in {pause} s")
            time.sleep(pause)
    return score.detail(asked, answers, **columns)


def open_task(
    source: ModelSource,
    prompts: Sequence[Prompt],
    score: Combined,
    config: TrainConfig,
    *,
    lora: ModelSource | None = None,
    given: Collection[str] = (),
    device: str = "auto",
    dtype: str = "auto",
    template: Mapping[str, Any] | None = None,
    ignore_weights: Sequence[str] = (),
    notify: Callable[[str], None] = lambda _: None,
) -> TrainingTask:
    """Tokenise the prompts and load the LLM.

    lora: an adapter to merge; given: names of settings that the user insists on; device: torch device, auto for CUDA if
    available; dtype: of the LLM, auto for bfloat16 on CUDA and float32 on a CPU; template: variables for the chat
    template; ignore_weights: patterns of surplus weights to leave out; notify: takes messages. Without a chat template,
    prompts are plain text. Raises ModelError, PromptError for a prompt that leaves no room for an answer, OptionError.
    """
    on = torch_device("--device", device)
    model_config = read_config(source)
    context = check_supported(model_config, source.name, None)
    tokenizer = load_tokenizer(source)
    if tokenizer is None:
        raise ModelError(f"{source.name} has no tokenizer, which training requires: add its tokenizer.json")
    adapter = None if lora is None else read_adapter(lora, source, model_config)
    for doubt in () if adapter is None else adapter.doubts(source.name, tokenizer):
        notify(f"note: {doubt}")
    tokens = [encode(prompt.asked, tokenizer, source.name, template=template) for prompt in prompts]
    least = config.max_new_tokens if "max_new_tokens" in given else 1
    for prompt, ids in zip(prompts, tokens, strict=True):
        if len(ids) + least > context:
            lower = "" if least == 1 else "lower --max-new-tokens, or "
            raise PromptError(
                f"a prompt of {len(ids)} tokens and an answer of {least} exceed the context of {source.name}, "
                f"{context} ({prompt.text[:60]!r}): {lower}remove the prompt"
            )
    if dtype == "auto":
        dtype = "bfloat16" if on.type == "cuda" else "float32"
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    model = load_model(source, ATTENTION, dtypes[dtype], ignore_weights=ignore_weights).to(on)
    weights = Weights(model, adapter=adapter).fingerprint()
    if adapter is not None:
        adapter.merge_into(model)
    eos = frozenset(eos_token_ids(model, tokenizer))
    environment = Environment(PackedLM(model), eos, config.top_k, config.top_p, config.max_new_tokens, context)
    training = Training(
        model=source.name if lora is None else adapted_name(source.name, lora.name),
        architecture=model.config.model_type,
        weights=weights,
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
    return TrainingTask(environment, tokenizer, prompts, tokens, score, training, notify)
