"""Figures of a demo LM on held-out groups: loss, and what greedy answers are like."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

from examples.demo_lm import corpus
from examples.demo_lm.lm import answer_loss, dialogues, encode, end_ids
from mara_deploy.demo.prompts import DemoPrompt, prompts
from mara_deploy.demo.score import sentences
from mara_runtime.candidates import select

MAX_NEW_TOKENS = 112
"""Longest answer that is decoded, tokens; the corpus's longest replies are shorter."""


@torch.no_grad()
def validation_loss(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, n: int = 400, seed: int = 0) -> float:
    """Return the mean loss over the answers of `n` dialogues of held-out groups, nats per token (<|im_end|> too)."""
    pairs = dialogues(random.Random(f"validation {seed}"), n, held_out_split=True)
    total, count = 0.0, 0
    for tokens, answer in encode(tokenizer, pairs):
        wanted = torch.zeros(1, len(tokens), dtype=torch.bool)
        wanted[0, answer:-1] = True
        losses = answer_loss(model, torch.tensor([tokens]), wanted)
        total, count = total + float(losses.sum()), count + len(losses)
    return total / count


@dataclass(frozen=True)
class Greedy:
    """Greedy answers and how often several tokens competed on the way."""

    answers: list[str]
    lengths: list[int]
    """tokens, the end-of-sequence token included"""
    finished: list[bool]
    """whether an end-of-sequence token came within MAX_NEW_TOKENS"""
    candidates: list[int]
    """number of candidates at every position of every answer"""

    @property
    def decision_share(self) -> float:
        """Share of positions with several candidates."""
        return sum(n > 1 for n in self.candidates) / len(self.candidates)

    @property
    def candidates_per_decision(self) -> float:
        """Mean number of candidates where there are several."""
        several = [n for n in self.candidates if n > 1]
        return sum(several) / max(1, len(several))


@torch.no_grad()
def greedy(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[DemoPrompt],
    top_k: int = 40,
    top_p: float = 0.95,
) -> Greedy:
    """Answer prompts greedily, all in one batch, counting each position's candidates as the decode loop would."""
    inputs = tokenizer(
        [corpus.chat(p.text) for p in prompts], add_special_tokens=False, padding=True, return_tensors="pt"
    )
    output: Any = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        do_sample=False,
        max_new_tokens=MAX_NEW_TOKENS,
        return_dict_in_generate=True,
        output_logits=True,
    )
    answers = output.sequences[:, inputs["input_ids"].shape[1] :]  # (B, T)
    ends = torch.isin(answers, torch.tensor(end_ids(tokenizer)))
    finished: list[bool] = ends.any(1).tolist()
    lengths = [int(row.float().argmax()) + 1 if any_ else len(row) for row, any_ in zip(ends, finished, strict=True)]
    logits = torch.stack(output.logits, 1).numpy()  # (B, T, V)
    ids = np.arange(logits.shape[-1])
    return Greedy(
        answers=[tokenizer.decode(a[:n], skip_special_tokens=True) for a, n in zip(answers, lengths, strict=True)],
        lengths=lengths,
        finished=finished,
        candidates=[len(select(ids, row, 0.0, top_k, top_p)) for b, n in enumerate(lengths) for row in logits[b, :n]],
    )


def measure(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    """Return the figures of recipe.json, all on groups that training never saw; greedy on 200 prompts."""
    loss = validation_loss(model, tokenizer)
    asked = prompts(200, seed=0, held_out_split=True)
    result = greedy(model, tokenizer, asked)
    spoken = [corpus.known(s, p.task) for p, a in zip(asked, result.answers, strict=True) for s in sentences(a)]
    figures = {
        "validation_loss_nats": loss,
        "perplexity": math.exp(loss),
        "decision_share": result.decision_share,
        "candidates_per_decision": result.candidates_per_decision,
        "mean_answer_tokens": sum(result.lengths) / len(asked),
        "finished_share": sum(result.finished) / len(asked),
        "grammatical_share": sum(spoken) / max(1, len(spoken)),
    }
    return {name: round(value, 4) for name, value in figures.items()}
