"""How to decode: one frozen dataclass, validated on construction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mara_runtime.errors import OptionError
from mara_runtime.options import Options, option
from mara_runtime.tensors import DRAFT_ROWS

STRATEGIES = ("top1", "max_prob", "random")
ORDERS = ("ranked", "best_last", "reversed")
FALLBACKS = ("first", "last")
SCHEDULES = ("adaptive", "one-by-one", "together")
TOP_K, TOP_P = 40, 0.95
"""Of an agent whose file does not record them: those of the paper's evaluation."""
ENGINES = ("tensorrt", "tensorrt-rtx", "cuda", "cpu")
"""Engines by preference: `auto` takes the first that both the bundle and the machine support."""
CONVERSATIONS = 8
"""Answers to many prompts that are decoded at once, by default."""


@dataclass(frozen=True)
class DecodeConfig(Options):
    """Options of one generation. Defaults are those of the MARA paper's evaluation (arXiv 2505.19743)."""

    align: bool = option(True, "plain decoding: the LLM alone, greedy unless --sample is given")
    agents: Mapping[str, float] | None = option(
        None,
        "agent of the bundle that judges candidates; of several, the margins are added, each times its number (1)",
        flag="--agent",
        unset="the bundle's first",
    )
    top_k: int | None = option(
        None, "maximum number of candidates per position", least=1, unset=f"as the agent was trained, else {TOP_K}"
    )
    top_p: float | None = option(
        None,
        "nucleus of the candidates, applied after --top-k",
        least=0,
        most=1,
        unset=f"as the agent was trained, else {TOP_P}",
    )
    max_new_tokens: int = option(512, "maximum number of tokens to generate, end-of-sequence included", least=1)
    strategy: str = option(
        "top1",
        "which accepted candidate to emit: the first examined, the one with the largest margin, or one at random",
        choices=STRATEGIES,
    )
    order: str = option(
        "ranked", "order of examination: by rank, by rank with the best candidate last, or reversed", choices=ORDERS
    )
    fallback: str | None = option(
        None, "candidate to emit when all are rejected", choices=FALLBACKS, unset="as recorded with the agent"
    )
    threshold: float = option(0.0, "accept candidates whose margin exceeds this")
    schedule: str = option(
        "adaptive", "how candidates share forward passes; affects speed, not the result", choices=SCHEDULES
    )
    draft: int | None = option(
        None,
        "maximum number of tokens to draft from repetitions and verify in the same pass; affects speed, not the result",
        least=0,
        most=DRAFT_ROWS,
        unset="as many as pay off, 0 unless --schedule is adaptive",
    )
    sample: bool = option(False, "with --no-align: sample instead of greedy decoding")
    temperature: float = option(1.0, "softmax temperature of --sample, applied after --top-k and --top-p", above=0)
    seed: int = option(0, "random seed of --strategy random and of sampling", least=0)
    stop: tuple[str, ...] = option((), "end the answer at this text, which is not part of it")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sample and self.align:
            raise OptionError("--sample is for plain decoding: add --no-align, or use --strategy random")
        if self.temperature != 1.0 and not self.sample:
            raise OptionError(f"--temperature is {self.temperature}, but it acts on --sample only; leave it out")

    @property
    def mix(self) -> tuple[float, ...]:
        """How much the margin of each agent counts."""
        return (1.0,) if self.agents is None else tuple(self.agents.values())

    @property
    def candidates(self) -> tuple[int, float]:
        """top-k and top-p."""
        return TOP_K if self.top_k is None else self.top_k, TOP_P if self.top_p is None else self.top_p
