"""Decisions as plain values: for servers, and for trace files, which `TraceFile` writes and `read_trace` reads.

A trace is a file of JSON lines. An answer is a line of facts, a line per token, and a last line:

    {"answer": 0, "format": 1, "bundle": …, "model": …, "beside": null, "prompt": …, "config": {…}}
    {"answer": 0, "piece": " the", "position": 17, "token": 262, "text": " the", "rank": 2, …, "candidates": […]}
    {"answer": 0, "text": "…", "finish_reason": "stop", "stats": {…}}

Lines of answers that are decoded side by side alternate; `answer` tells them apart. docs/guide/see.md describes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mara_runtime.config import DecodeConfig
from mara_runtime.errors import MaraError

if TYPE_CHECKING:
    from mara_runtime.agents import EachAgent
    from mara_runtime.answer import Piece
    from mara_runtime.decoder import AlignedDecoder
    from mara_runtime.prompt import Prompt
    from mara_runtime.stats import Step
    from mara_runtime.text import TextSide

FORMAT = 1
Margins = Mapping[int, Mapping[str, float]]
"""{LM rank: {agent: its margin}}"""


def record(step: Step, side: TextSide | None, each: Margins | None = None) -> dict[str, Any]:
    """A decision as plain values, with the text of each token if the bundle has a tokenizer.

    each: margins of the agents by themselves, of the examined candidates.
    """

    def named(token: int) -> dict[str, Any]:
        if side is None:
            return {"token": token}
        return {"token": token, "text": side.tokenizer.decode([token], skip_special_tokens=False)}

    found = step.candidates
    ranked = zip(found.ids.tolist(), found.probabilities.tolist(), found.log_probabilities.tolist(), strict=True)
    return {
        "position": step.position,
        **named(step.token),
        "rank": step.rank,
        "forced": step.forced,
        "drafted": step.drafted,
        "candidates": [
            {
                "rank": rank,
                **named(token),
                "probability": round(probability, 6),
                "log_probability": round(log_probability, 6),
                "margin": step.margins.get(rank),
                **({} if each is None else {"margins": each.get(rank)}),
            }
            for rank, (token, probability, log_probability) in enumerate(ranked, start=1)
        ],
    }


class TraceFile:
    """Answers of a decoder, each written as it is decoded.

    write: takes the lines as objects. beside_plain: each prompt is also answered by the LLM alone, in the same passes,
    and both answers are written.
    """

    def __init__(
        self, decoder: AlignedDecoder, write: Callable[[dict[str, Any]], None], *, beside_plain: bool = False
    ) -> None:
        self._decoder, self._write, self._beside_plain = decoder, write, beside_plain
        self._answers = 0

    def stream(self, prompt: Prompt, config: DecodeConfig | None = None, **options: Any) -> Iterator[Piece]:
        """The pieces of an answer; see `AlignedDecoder.stream`.

        Where several agents are mixed, the margin of each is computed on the host, from hidden states that the passes
        return on request; where it is one, nothing is asked for.
        """
        from mara_runtime.agents import EachAgent

        decoder = self._decoder
        config = decoder.resolve(config or DecodeConfig())
        agents = tuple(config.agents or ()) if config.align else ()
        each = EachAgent(decoder.bundle, agents) if len(agents) > 1 else None
        configs = [config]
        if self._beside_plain and config.align:
            configs.append(replace(config, align=False))
        if len(configs) == 1:
            pieces = ((0, piece) for piece in decoder.stream(prompt, config, **options, states=each is not None))
        else:
            many = decoder.generate_many([prompt] * 2, configs, places=2, **options, states=each is not None)
            pieces = ((index, _raised(piece)) for index, piece in many)
        return self._written(pieces, prompt, configs, each)

    def _written(
        self,
        pieces: Iterator[tuple[int, Piece]],
        prompt: Prompt,
        configs: list[DecodeConfig],
        each: EachAgent | None,
    ) -> Iterator[Piece]:
        """The pieces of the first answer. What comes of all of them is written on the way."""
        first = self._answers
        for index, piece in pieces:
            if self._answers == first:  # nothing is written of a prompt that is refused
                self._answers += len(configs)
                for beside, config in enumerate(configs):
                    self._write(self._facts(first + beside, first if beside else None, prompt, config))
            margins = None if each is None or index else margins_of_each(piece.step, each)
            self._write(
                {"answer": first + index, "piece": piece.text, **record(piece.step, self._decoder.text_side, margins)}
            )
            if (result := piece.result) is not None:
                end = {"text": result.text, "finish_reason": result.finish_reason, "stats": result.stats.to_json()}
                self._write({"answer": first + index, **end})
            if index == 0:
                yield piece

    def _facts(self, answer: int, beside: int | None, prompt: Prompt, config: DecodeConfig) -> dict[str, Any]:
        """The first line of an answer. beside: the answer that it is the plain one of."""
        bundle = self._decoder.bundle
        return {
            "answer": answer,
            "format": FORMAT,
            "bundle": bundle.folder.resolve().name,
            "model": bundle.manifest.model.source,
            "beside": beside,
            "prompt": prompt if isinstance(prompt, str) else [_plain(each) for each in prompt],
            "config": config.to_json(),
        }


def margins_of_each(step: Step, each: EachAgent) -> dict[int, dict[str, float]]:
    """{LM rank: {agent: its margin}} of the candidates whose hidden states a step has."""
    if not step.states:
        return {}
    found = each.margins([*step.states.values()]).T.tolist()
    return {rank: dict(zip(each.names, row, strict=True)) for rank, row in zip(step.states, found, strict=True)}


def _raised(piece: Piece | MaraError) -> Piece:
    if isinstance(piece, MaraError):
        raise piece
    return piece


def _plain(part: Any) -> Any:
    """A message, or a token id, which may be NumPy's."""
    return dict(part) if isinstance(part, Mapping) else int(part)
