"""`AlignedDecoder`: an open bundle; text in, aligned text out.

    generate()  the whole answer              → Generation
    stream()    one piece per token           → Piece, the last with the Generation
    decode()    token ids only, without text  (mara_runtime.decode)

Each is a thin wrapper around the next.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mara_runtime.bundle import Bundle
from mara_runtime.chat import Message
from mara_runtime.config import TOP_K, TOP_P, DecodeConfig
from mara_runtime.decode import Request, Session, decode
from mara_runtime.engines import open_engine
from mara_runtime.engines.base import Engine
from mara_runtime.errors import EngineError, MaraError, OptionError, PromptError
from mara_runtime.manifest import AgentFacts
from mara_runtime.schedule.acceptance import Acceptance
from mara_runtime.schedule.adaptive import Adaptive
from mara_runtime.schedule.base import Fixed, Schedule
from mara_runtime.schedule.calibrate import measured_cost
from mara_runtime.schedule.cost import Cost
from mara_runtime.schedule.drafts import NGrams
from mara_runtime.stats import Stats, Step
from mara_runtime.text import TextSide, TextStream

Prompt = str | Sequence[Message] | Sequence[int] | NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Generation:
    """One answer."""

    token_ids: list[int]
    """emitted ids, end-of-sequence included"""
    text: str | None
    """without special tokens and stop text; None when the bundle has no tokenizer"""
    finish_reason: str
    """"stop": an end-of-sequence id or a stop text; "length": max_new_tokens or the bundle's capacity"""
    stats: Stats
    engine: dict[str, Any]
    """what ran, and why preferred engines declined"""
    config: DecodeConfig
    """as used: the fallback is the one that was in force"""

    def to_json(self) -> dict[str, Any]:
        """Plain values, as `mara-run --json` prints them."""
        return {
            "token_ids": self.token_ids,
            "text": self.text,
            "finish_reason": self.finish_reason,
            "stats": {**self.stats.to_json(), "engine": self.engine},
            "config": self.config.to_json(),
        }


@dataclass(frozen=True)
class Piece:
    """What one token adds to an answer."""

    text: str
    """may be empty: a token can be part of a character, or of a possible stop text"""
    step: Step
    result: Generation | None = None
    """the whole answer, on the last piece"""


class _Locked(Iterator[Piece]):
    """Pieces made one at a time under a lock, so that threads may share a stream: each piece goes to one of them."""

    def __init__(self, pieces: Iterator[Piece], lock: AbstractContextManager[Any]) -> None:
        self._pieces, self._lock = pieces, lock

    def __next__(self) -> Piece:
        with self._lock:
            return next(self._pieces)


class AlignedDecoder:
    """A bundle ready to decode. One answer at a time, as there is one KV cache: between threads, `generate` waits for
    its turn, and a stream raises an error once another answer has begun.

    A prompt that starts with cached tokens, as the next turn of a conversation does, reuses their entries.

    engine: "auto" takes the best that bundle and machine have; an open engine may serve several decoders of its bundle
    in turn. threads: of a CPU engine that is opened here, default one per physical core.
    verify: compare the bundle's files with their checksums first. require_signature: file of the public key whose owner
    must have signed the bundle. cost: of passes on this machine, by default measured
    at the first adaptive answer, once per bundle and machine. report: called with a line before something slow.
    """

    def __init__(
        self,
        bundle: Bundle | str | Path,
        *,
        engine: str | Engine = "auto",
        threads: int | None = None,
        verify: bool = True,
        require_signature: str | Path | None = None,
        cost: Cost | None = None,
        report: Callable[[str], None] = lambda _: None,
    ) -> None:
        if isinstance(bundle, Bundle):
            if require_signature is not None:
                raise OptionError("require_signature is given, and the bundle is open already: give it to Bundle.open")
            self.bundle = bundle
        else:
            self.bundle = Bundle.open(bundle, verify=verify, require_signature=require_signature)
        self.text_side = TextSide(self.bundle) if self.bundle.manifest.tokenizer is not None else None
        self.engine: Engine
        if isinstance(engine, str):
            self.engine, self.declined = open_engine(self.bundle, engine, threads)
        else:
            if threads is not None:
                raise OptionError(f"threads is {threads}, and the engine is open already: give it when that is opened")
            self.engine, self.declined = engine, {}
        self._cache, needed = self.engine.cache, self.bundle.manifest.slots
        if self._cache.capacity < needed:
            raise EngineError(
                f"the engine has {self._cache.capacity} KV slots; {self.bundle.folder} needs {needed}: max_context and "
                "the slots of one decision"
            )
        self._cost, self._report = cost, report
        self._acceptance, self._drafts = defaultdict[tuple[str, ...], Acceptance](Acceptance), NGrams()

    def forget(self) -> None:
        """Clear the KV cache, and forget what was learned of agents and texts."""
        with self._cache.lock:
            self._cache.owner = None
            self._cache.clear()
            self._acceptance.clear()
            self._drafts = NGrams()

    def encode(
        self,
        prompt: Prompt,
        *,
        raw: bool = False,
        template: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
        agents: Iterable[str] | None = None,
    ) -> list[int]:
        """Token ids of a prompt.

        prompt: a user message, which goes through the bundle's chat template unless `raw` or there is none;
        a conversation, [{"role": …, "content": …}, …]; or token ids, taken as they are.
        template: variables for the chat template, {"enable_thinking": False} say; others are as in the training of
        the first of `agents`, by default the bundle's first.
        continue_final_message: the last message of the conversation is the beginning of the answer.
        Raises PromptError when it is empty, out of the vocabulary, or leaves no room for a token, and OptionError for
        variables without a template.
        """
        manifest = self.bundle.manifest
        if isinstance(prompt, np.ndarray):
            prompt = prompt.tolist()
        if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
            raise PromptError(
                f"the prompt is of type {type(prompt).__name__}; it must be a text, a list of messages, or a list or "
                "NumPy array of token ids"
            )
        is_ids = not isinstance(prompt, str) and all(isinstance(item, Integral) for item in prompt)
        if continue_final_message and (is_ids or isinstance(prompt, str)):
            raise PromptError("continue_final_message needs a conversation, whose last message the answer continues")
        if is_ids:
            if template:
                raise OptionError("variables of the chat template are given, which token ids leave out")
            ids = [int(item) for item in prompt]  # type: ignore[arg-type]
        else:
            side = self.text_side or TextSide(self.bundle)  # the second raises, saying what to do
            if raw or not side.has_template:
                where = "raw text leaves out" if raw else f"{self.bundle.folder} does not have"
                if template:
                    raise OptionError(f"variables of the chat template are given, which {where}")
                if not isinstance(prompt, str):
                    raise PromptError(f"a conversation needs the chat template, which {where}")
                ids = side.encode_raw(prompt)
            else:
                messages: Any = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
                ids = side.encode_chat(messages, self.variables(template, agents), continue_final_message)
        if not ids:
            raise PromptError("the prompt is empty: give at least one token")
        for index, token in enumerate(ids):
            if not 0 <= token < manifest.model.shape.vocab_size:
                raise PromptError(
                    f"token id {token} at index {index} of the prompt is outside the vocabulary, "
                    f"0 to {manifest.model.shape.vocab_size - 1}"
                )
        if len(ids) >= manifest.max_context:
            raise PromptError(
                f"the prompt has {len(ids)} tokens; this bundle holds {manifest.max_context} for prompt and answer: "
                "shorten it, or export with a larger --max-context"
            )
        return ids

    def variables(
        self, template: Mapping[str, Any] | None = None, agents: Iterable[str] | None = None
    ) -> dict[str, Any]:
        """Variables for the chat template: those given, and of the others those that the agent was trained with.

        agents: by name, of which the first counts; default the bundle's first.
        """
        agent, side = self._leading(agents), self.text_side
        training = None if agent is None else agent.training
        trained = {}
        if training is not None and training.template and side is not None and side.has_template:
            trained = {name: training.template[name] for name in training.template if name in side.template.variables}
        return {**trained, **(template or {})}

    def stream(
        self,
        prompt: Prompt,
        config: DecodeConfig | None = None,
        *,
        raw: bool = False,
        template: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
    ) -> Iterator[Piece]:
        """Decode an answer token by token; see `encode` for prompts. The last piece carries the result.

        Its text is what comes after the prompt, also after a final message that it continues.
        """
        config = self.resolve(config or DecodeConfig())
        options: dict[str, Any] = {"template": template, "continue_final_message": continue_final_message}
        ids = self.encode(prompt, raw=raw, agents=config.agents, **options)
        with self._cache.lock:
            self._cache.owner = answer = object()
        return _Locked(self._pieces(ids, config, answer, ids if continue_final_message else ()), self._cache.lock)

    def generate(
        self,
        prompt: Prompt,
        config: DecodeConfig | None = None,
        *,
        raw: bool = False,
        template: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
    ) -> Generation:
        """Decode a whole answer; see `encode` for prompts. Threads that ask at the same time wait for each other."""
        result = None
        with self._cache.lock:
            options: dict[str, Any] = {"template": template, "continue_final_message": continue_final_message}
            for piece in self.stream(prompt, config, raw=raw, **options):
                result = piece.result
        assert result is not None  # at least one token is emitted, and the last piece carries the result
        return result

    def resolve(self, config: DecodeConfig) -> DecodeConfig:
        """The configuration with what it leaves to the bundle.

        That is the agents, by default the bundle's first, and top-k, top-p and fallback as the first of them was
        trained. Raises OptionError for what the bundle does not allow or have.
        """
        manifest = self.bundle.manifest
        most = manifest.max_candidates
        if config.top_k is not None and config.top_k > most and (config.align or config.sample):
            raise OptionError(f"--top-k is {config.top_k}; this bundle allows 1 to {most} (--max-candidates at export)")
        if config.stop and self.text_side is None:
            raise OptionError("--stop needs text, and this bundle holds no tokenizer")
        agent = self._leading(config.agents)
        if agent is None and config.align:
            raise OptionError(
                f"{self.bundle.folder} has no agent: add one with mara-agent, or decode without: --no-align"
            )
        agents = config.agents or ({} if agent is None else {agent.name: 1.0})
        for name in agents:
            manifest.agent(name)
        training = None if agent is None else agent.training
        top_k, top_p = (TOP_K, TOP_P) if training is None else (training.top_k, training.top_p)
        return replace(
            config,
            agents=agents or None,
            top_k=min(top_k, most) if config.top_k is None else config.top_k,
            top_p=top_p if config.top_p is None else config.top_p,
            fallback=config.fallback or ("first" if agent is None else agent.fallback),
        )

    def _leading(self, agents: Iterable[str] | None) -> AgentFacts | None:
        """The first of these agents, default the bundle's first; None: it has none. Raises OptionError."""
        manifest = self.bundle.manifest
        first = next(iter(agents or ()), None)
        return manifest.agent(first) if first is not None else next(iter(manifest.agents), None)

    def _check_owner(self, answer: object) -> None:
        if self._cache.owner is not answer:
            raise MaraError("this answer cannot go on: another has begun on the same engine, which has one KV cache")

    def _session(self, config: DecodeConfig) -> Session:
        adaptive = config.schedule == "adaptive"
        drafts = self._drafts if config.draft or (config.draft is None and adaptive) else None
        noise = self.bundle.manifest.mixed_noise(config.agents or {})
        return Session(self._cache, self._schedule(config), drafts, noise)

    def _schedule(self, config: DecodeConfig) -> Schedule:
        if config.schedule == "adaptive" and (config.align or (config.draft != 0 and not config.sample)):
            if self._cost is None:
                self._cost = measured_cost(self.bundle, self.engine, self._report)
            return Adaptive(self._cost, self._acceptance[tuple(config.agents or ())])
        return Fixed(1 if config.schedule == "one-by-one" else None, config.draft or 0)

    def _pieces(self, ids: list[int], config: DecodeConfig, answer: object, context: Sequence[int]) -> Iterator[Piece]:
        """Runs under the cache's lock."""
        manifest = self.bundle.manifest
        eos = frozenset(manifest.model.eos_token_ids)
        limit = min(config.max_new_tokens, manifest.max_context - len(ids))
        request = Request(ids, config, config.fallback or "first", eos, limit)
        stats = Stats()
        self._check_owner(answer)  # before a measurement overwrites the cache of another answer
        if config.align:
            self.engine.use(tuple(config.agents or ()))
        session = self._session(config)
        stream = TextStream(self.text_side, config.stop, context) if self.text_side else None
        emitted: list[int] = []
        steps = decode(self.engine, session, request, stats)
        while True:
            self._check_owner(answer)
            step = next(steps)
            emitted.append(step.token)
            text = stream.push(step.token) if stream else ""
            ended = step.token in eos or (stream is not None and stream.stopped)
            if not (ended or len(emitted) == limit):
                yield Piece(text, step)
                continue
            text += stream.finish() if stream else ""
            # text held back may contain a stop text that the last token's bytes completed
            ended = ended or (stream is not None and stream.stopped)
            result = Generation(
                token_ids=emitted,
                text=stream.text if stream else None,
                finish_reason="stop" if ended else "length",
                stats=stats,
                engine={**self.engine.describe(), "declined": self.declined},
                config=config,
            )
            yield Piece(text, step, result)
            return
