"""`AlignedDecoder`: an open bundle; text in, aligned text out.

    generate()       the whole answer                     → Generation
    stream()         one piece per token                  → Piece, the last with the Generation
    generate_many()  several answers at once              → pieces of all of them, as they come
    answers()        the same, and others may join        → for a server
    decode()         token ids only, without text         (mara_runtime.decode, mara_runtime.batch)

Each is a thin wrapper around those below it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from mara_runtime import in_force
from mara_runtime.answer import Assembler, Generation, Piece
from mara_runtime.batch import Answers, Batcher
from mara_runtime.bundle import Bundle
from mara_runtime.config import CONVERSATIONS, DecodeConfig
from mara_runtime.decode import Request, Session, decode
from mara_runtime.engines import open_engine
from mara_runtime.engines.base import Engine
from mara_runtime.errors import EngineError, MaraError, OptionError
from mara_runtime.prompt import Prompt, encode
from mara_runtime.schedule.acceptance import Acceptance
from mara_runtime.schedule.adaptive import Adaptive
from mara_runtime.schedule.base import Fixed, Schedule
from mara_runtime.schedule.calibrate import measured_cost
from mara_runtime.schedule.cost import Cost
from mara_runtime.schedule.drafts import NGrams
from mara_runtime.text import TextSide

T = TypeVar("T")
MOST_MIXES = 64
"""Of which what was learned is kept: clients of a server may ask for any order of any agents."""


class _Locked(Iterator[T]):
    """Items made one at a time under a lock, so that threads may share them: each goes to one of them."""

    def __init__(self, items: Iterator[T], lock: AbstractContextManager[Any]) -> None:
        self._items, self._lock = items, lock

    def __next__(self) -> T:
        with self._lock:
            return next(self._items)


class AlignedDecoder:
    """A bundle ready to decode. One call at a time has the engine: between threads, `generate` waits for its turn, and
    a stream raises an error once another call has begun.

    A prompt that starts with cached tokens, as the next turn of a conversation does, reuses their entries.

    engine: "auto" takes the best that bundle and machine have; an open engine may serve several decoders of its bundle
    in turn. threads: of a CPU engine that is opened here, default one per physical core.
    verify: compare the bundle's files with their checksums first. require_signature: file of the public key whose owner
    must have signed the bundle. cost: of passes on this machine, by default measured at the first adaptive answer, once
    per bundle and machine. places: conversations whose tokens `generate` and `stream` keep, the oldest making room;
    each takes memory. report: called with a line before something slow.
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
        places: int = 1,
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
        capacity, needed = self.engine.cache.capacity, self.bundle.manifest.slots
        if capacity < needed:
            raise EngineError(
                f"the engine has {capacity} KV slots; {self.bundle.folder} needs {needed}: max_context and the slots "
                "of one decision"
            )
        _check_places(places)
        with self.engine.places.lock:
            self.engine.places.open(places)
        self._places, self._cost, self._report = range(places), cost, report
        self._acceptance: dict[tuple[str, ...], Acceptance] = {}  # by agents in order, the last used last
        self._drafts = defaultdict[int, NGrams](NGrams)  # by place

    def forget(self) -> None:
        """Clear the KV caches, and forget what was learned of agents and texts."""
        places = self.engine.places
        with places.lock:
            places.owner = None
            for cache in places:
                cache.clear()
            self._acceptance.clear()
            self._drafts.clear()

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
        return encode(
            self.bundle,
            self.text_side,
            prompt,
            raw=raw,
            template=template,
            variables=lambda: self.variables(template, agents),
            continue_final_message=continue_final_message,
        )

    def variables(
        self, template: Mapping[str, Any] | None = None, agents: Iterable[str] | None = None
    ) -> dict[str, Any]:
        """Variables for the chat template: those given, and of the others those that the agent was trained with.

        agents: by name, of which the first counts; default the bundle's first.
        """
        return in_force.variables(self.bundle, self.text_side, template, agents)

    def stream(
        self,
        prompt: Prompt,
        config: DecodeConfig | None = None,
        *,
        raw: bool = False,
        template: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
        states: bool = False,
    ) -> Iterator[Piece]:
        """Decode an answer token by token; see `encode` for prompts. The last piece carries the result.

        Its text is what comes after the prompt, also after a final message that it continues. states: steps have the
        hidden states of the examined candidates.
        """
        config = self.resolve(config or DecodeConfig())
        options: dict[str, Any] = {"template": template, "continue_final_message": continue_final_message}
        ids = self.encode(prompt, raw=raw, agents=config.agents, **options)
        places = self.engine.places
        with places.lock:
            places.owner = owner = object()
        return _Locked(self._pieces(ids, config, owner, ids if continue_final_message else (), states), places.lock)

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
        with self.engine.places.lock:
            options: dict[str, Any] = {"template": template, "continue_final_message": continue_final_message}
            for piece in self.stream(prompt, config, raw=raw, **options):
                result = piece.result
        assert result is not None  # at least one token is emitted, and the last piece carries the result
        return result

    def generate_many(
        self,
        prompts: Sequence[Prompt],
        config: DecodeConfig | Sequence[DecodeConfig] | None = None,
        *,
        places: int = CONVERSATIONS,
        share: bool = True,
        raw: bool = False,
        template: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
        states: bool = False,
    ) -> Iterator[tuple[int, Piece | MaraError]]:
        """Decode several answers at once; see `encode` for prompts, and `stream` for the pieces of each.

        Yields (index of the prompt, piece) as tokens come; in place of a piece, the error that ended that answer or
        refused its prompt. config: one for all, or one per prompt. places: answers at once at most, each with its own
        KV cache. share: prompts begin with what any cache holds of them; otherwise nothing from before takes part.
        Raises OptionError, and EngineError if there is not enough memory for the caches.
        """
        _check_places(places)
        if config is None or isinstance(config, DecodeConfig):
            configs = [self.resolve(config or DecodeConfig())] * len(prompts)
        elif len(config) != len(prompts):
            raise OptionError(f"config has {len(config)} entries, and there are {len(prompts)} prompts: give one each")
        else:
            configs = list(config)
        options: dict[str, Any] = {"template": template, "continue_final_message": continue_final_message}
        ready: list[tuple[int, list[int], DecodeConfig]] = []
        refused: list[tuple[int, MaraError]] = []
        for index, prompt in enumerate(prompts):
            try:
                resolved = self.resolve(configs[index])
                ready.append((index, self.encode(prompt, raw=raw, agents=resolved.agents, **options), resolved))
            except MaraError as error:
                refused.append((index, error))
        held = self.engine.places
        with held.lock:
            held.open(min(places, held.most, max(1, len(ready))))
            held.owner = owner = object()
        return _Locked(self._many(ready, refused, owner, share, continue_final_message, states), held.lock)

    def answers(self, *, places: int = CONVERSATIONS) -> Answers:
        """Answers that are asked for while others are in the making, as by the clients of a server.

        places: as in `generate_many`. The cost of passes is measured now, if it has not been. Another call ends all of
        them, as it ends a stream. Raises EngineError if there is not enough memory for the caches.
        """
        _check_places(places)
        held = self.engine.places
        with held.lock:
            held.open(min(places, held.most))
            held.owner = owner = object()
            self._measure([DecodeConfig()])
        return self._answers(owner, share=True)

    def resolve(self, config: DecodeConfig) -> DecodeConfig:
        """The configuration with what it leaves to the bundle.

        That is the agents, by default the bundle's first, and top-k, top-p and fallback as the first of them was
        trained. Raises OptionError for what the bundle does not allow or have.
        """
        return in_force.resolve(self.bundle, config)

    # ── under the lock of the engine's places ────────────────────────────────────────────────────────────────────────

    def _check_owner(self, owner: object) -> None:
        if self.engine.places.owner is not owner:
            raise MaraError("this answer cannot go on: another has begun on the same engine")

    def _pieces(
        self, ids: list[int], config: DecodeConfig, owner: object, context: Sequence[int], states: bool
    ) -> Iterator[Piece]:
        self._check_owner(owner)  # before a measurement overwrites the cache of another answer
        if config.align:
            self.engine.use(tuple(config.agents or ()))
        self._measure([config])
        request, assembler = self._request(ids, config, context, states)
        session = self._session(self.engine.places.seat(ids, self._places), request)
        steps = decode(self.engine, session, request, assembler.stats)
        result = None
        while result is None:
            self._check_owner(owner)
            piece = assembler.piece(next(steps))
            result = piece.result
            yield piece

    def _many(
        self,
        ready: Sequence[tuple[int, list[int], DecodeConfig]],
        refused: Sequence[tuple[int, MaraError]],
        owner: object,
        share: bool,
        continued: bool,
        states: bool,
    ) -> Iterator[tuple[int, Piece | MaraError]]:
        yield from refused
        self._check_owner(owner)
        self._measure([config for _, _, config in ready])
        answers = self._answers(owner, share)
        asked = {answers.submit(ids, config, ids if continued else (), states): index for index, ids, config in ready}
        while answers.batcher.busy:
            for job, event in answers.step():
                yield asked[job], event

    def _answers(self, owner: object, share: bool) -> Answers:
        batcher = Batcher(self.engine, partial(self._session, share=share), share=share)
        return Answers(batcher, self._request, self.engine.places.lock, partial(self._check_owner, owner))

    def _request(
        self, ids: list[int], config: DecodeConfig, context: Sequence[int], states: bool
    ) -> tuple[Request, Assembler]:
        manifest = self.bundle.manifest
        eos = frozenset(manifest.model.eos_token_ids)
        limit = min(config.max_new_tokens, manifest.max_context - len(ids))
        assembler = Assembler(config, limit, eos, self.text_side, context, self._describe)
        return Request(ids, config, config.fallback or "first", eos, limit, assembler.ends, states), assembler

    def _describe(self) -> dict[str, Any]:
        return {**self.engine.describe(), "declined": self.declined}

    def _session(self, place: int, request: Request, share: bool = True) -> Session:
        config = request.config
        drafts = None
        if config.draft or (config.draft is None and config.schedule == "adaptive"):
            drafts = self._drafts[place] if share else NGrams()
        noise = self.bundle.manifest.mixed_noise(config.agents or {})
        return Session(self.engine.places[place], self._schedule(config), drafts, noise, place=place)

    def _measure(self, configs: Iterable[DecodeConfig]) -> None:
        """Measure the cost of passes if one of these needs it."""
        if self._cost is None and any(map(_adapts, configs)):
            self._cost = measured_cost(self.bundle, self.engine, self._report)

    def _schedule(self, config: DecodeConfig) -> Schedule:
        if _adapts(config):
            assert self._cost is not None  # measured before
            agents = tuple(config.agents or ())
            self._acceptance[agents] = learned = self._acceptance.pop(agents, None) or Acceptance()
            if len(self._acceptance) > MOST_MIXES:
                del self._acceptance[next(iter(self._acceptance))]
            return Adaptive(self._cost, learned)
        return Fixed(1 if config.schedule == "one-by-one" else None, config.draft or 0)


def _adapts(config: DecodeConfig) -> bool:
    """Whether there is anything for the adaptive schedule to choose."""
    return config.schedule == "adaptive" and (config.align or (config.draft != 0 and not config.sample))


def _check_places(places: int) -> None:
    if places < 1:
        raise OptionError(f"places is {places}; it must be at least 1")
