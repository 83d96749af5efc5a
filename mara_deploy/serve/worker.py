"""A bundle's answers, made on a thread of its own; requests come and go on the event loop.

    event loop   ask ──→ inbox                 PendingAnswer: pieces, as they come ──→ client
                           │                          ↑
    thread                 └─→ Answers.step, again and again: passes that all answers share

The thread alone runs passes. Between two of them it takes what is in the inbox: new answers, and those that nobody
wants any more, whose places are free for the next pass.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mara_deploy.serve.errors import ApiError, internal_error
from mara_deploy.serve.settings import ServeSettings
from mara_runtime.answer import Piece
from mara_runtime.batch import Job
from mara_runtime.config import DecodeConfig
from mara_runtime.decoder import AlignedDecoder
from mara_runtime.errors import MaraError
from mara_runtime.prompt import Prompt
from mara_runtime.text import TextSide

Item = Piece | Exception
_FIRST_ESTIMATE_S = 1.0
"""Of an answer's duration."""


class PendingAnswer(AsyncIterator[Piece]):
    """One answer on its way to a client: its pieces, the last with the result. Raises the error that ended it.

    Close it when nobody reads on.
    """

    def __init__(self, worker: Worker, deadline: float) -> None:
        self.deadline = deadline
        """of time.monotonic()"""
        self.started = time.monotonic()
        self.ids: list[int] = []
        self.config = DecodeConfig()
        self.given_up = False
        self.job: Job | None = None
        """the thread's; None: it has not taken it yet"""
        self.ended = False
        """on the event loop: its last piece or error has come, or nobody waits for one"""
        self._worker = worker
        self._items = asyncio.Queue[Item]()

    async def __anext__(self) -> Piece:
        """The next piece."""
        if self.ended and self._items.empty():
            raise StopAsyncIteration
        item = await self._items.get()
        if isinstance(item, Exception):
            raise item
        return item

    def put(self, item: Item) -> None:
        """Called on the event loop."""
        self.ended = self.ended or isinstance(item, Exception) or item.result is not None
        self._items.put_nowait(item)

    def close(self) -> None:
        """Give up what has not been made yet; its place is free after the pass that is running."""
        if not self.ended:
            self.ended = True
            self._worker.give_up(self)


class Worker:
    """Owns a decoder, and makes the answers of its bundle.

    report: takes an exception that is a defect of this project; the answers in the making end with it, and the worker
    goes on.
    """

    def __init__(
        self, name: str, decoder: AlignedDecoder, settings: ServeSettings, report: Callable[[Exception], None]
    ) -> None:
        if decoder.text_side is None:
            raise MaraError(f"{decoder.bundle.folder} has no tokenizer, so it cannot serve text")
        self.name, self.decoder, self.manifest = name, decoder, decoder.bundle.manifest
        self.text_side: TextSide = decoder.text_side
        self._answers = decoder.answers(places=settings.conversations)
        self.places = len(decoder.engine.places)
        self._queue, self._timeout_s, self._report = settings.queue, settings.timeout_s, report
        self._encoder = ThreadPoolExecutor(1, f"encode-{name}")
        self._thread = threading.Thread(target=self._work, name=f"decode-{name}", daemon=True)
        self._changed = threading.Condition()
        self._inbox: list[PendingAnswer] = []
        """new, or given up"""
        self._closed = False
        self._making: dict[Job, PendingAnswer] = {}  # the thread's
        self._open = set[PendingAnswer]()  # the event loop's, as everything below
        self._draining = False
        self._mean_s = _FIRST_ESTIMATE_S
        self._loop: asyncio.AbstractEventLoop | None = None

    # ── on the event loop ────────────────────────────────────────────────────────────────────────────────────────────

    def start(self) -> None:
        """Begin to work, for the event loop that is running."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def ask(
        self, prompt: Prompt, config: DecodeConfig, *, raw: bool, template: Mapping[str, Any]
    ) -> PendingAnswer:
        """Queue an answer. Raises ApiError (429, 503), PromptError or OptionError."""
        if self._draining:
            raise ApiError(503, "shutting_down", "the server is shutting down", retry_after_s=10)
        if len(self._open) >= self.places + self._queue:
            raise ApiError(
                429,
                "queue_full",
                f"{self.name} has {len(self._open)} requests, as many as it takes: try again later",
                retry_after_s=math.ceil(self._mean_s * (1 + self._queue / self.places)),
            )
        answer = PendingAnswer(self, time.monotonic() + self._timeout_s)
        self._open.add(answer)
        try:
            answer.config = config = self.decoder.resolve(config)
            answer.ids = await asyncio.get_running_loop().run_in_executor(
                self._encoder,
                lambda: self.decoder.encode(prompt, raw=raw, template=template, agents=config.agents),
            )
        except BaseException:
            self._open.discard(answer)
            raise
        self._send(answer)
        return answer

    def give_up(self, answer: PendingAnswer) -> None:
        """See `PendingAnswer.close`."""
        self._open.discard(answer)
        answer.given_up = True
        self._send(answer)

    def drain(self, grace_s: float) -> None:
        """Take no more requests; those there are have so many seconds to end."""
        self._draining = True
        for answer in self._open:
            answer.deadline = min(answer.deadline, time.monotonic() + grace_s)

    @property
    def idle(self) -> bool:
        """Whether nobody waits for an answer."""
        return not self._open

    @property
    def alive(self) -> bool:
        """Whether it works."""
        return self._thread.is_alive()

    @property
    def places_in_use(self) -> int:
        """Conversations in the passes that are running."""
        return self._answers.batcher.seated

    @property
    def queued(self) -> int:
        """Requests that have no place yet."""
        return max(0, len(self._open) - self.places_in_use)

    @property
    def cached_tokens(self) -> int:
        """Tokens whose KV entries the places hold."""
        return sum(len(cache.tokens) for cache in self.decoder.engine.places)

    def close(self) -> None:
        """Stop after the pass that is running."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._encoder.shutdown(wait=False, cancel_futures=True)
        if self._thread.ident is not None:
            self._thread.join()

    def _send(self, answer: PendingAnswer) -> None:
        with self._changed:
            self._inbox.append(answer)
            self._changed.notify()

    def _tell(self, told: list[tuple[PendingAnswer, Item]]) -> None:
        for answer, item in told:
            if answer.given_up:
                continue
            answer.put(item)
            if answer.ended:
                self._open.discard(answer)
                self._mean_s += (time.monotonic() - answer.started - self._mean_s) / 8

    # ── on the thread ────────────────────────────────────────────────────────────────────────────────────────────────

    def _work(self) -> None:
        assert self._loop is not None
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._inbox or self._making or self._closed)
                if self._closed:
                    return
                inbox, self._inbox = self._inbox, []
            told: list[tuple[PendingAnswer, Item]] = []
            try:
                self._take(inbox, told)
                self._end_late(told)
                for job, item in self._answers.step():
                    told.append((self._making[job], item))
                    if isinstance(item, MaraError) or item.result is not None:
                        del self._making[job]
            except Exception as error:
                self._report(error)
                for job, answer in [*self._making.items()]:
                    self._drop(job)
                    told.append((answer, internal_error()))
            if told:
                self._loop.call_soon_threadsafe(self._tell, told)

    def _take(self, inbox: list[PendingAnswer], told: list[tuple[PendingAnswer, Item]]) -> None:
        """Submit what is new, and drop what nobody wants."""
        for answer in inbox:
            if answer.given_up:
                if answer.job is not None:
                    self._drop(answer.job)
                continue
            try:
                answer.job = self._answers.submit(answer.ids, answer.config)
                self._making[answer.job] = answer
            except MaraError as error:
                told.append((answer, error))

    def _end_late(self, told: list[tuple[PendingAnswer, Item]]) -> None:
        now = time.monotonic()
        for job, answer in [*self._making.items()]:
            if answer.deadline <= now:
                self._drop(job)
                told.append((answer, ApiError(504, "timeout", "the answer took too long, and was ended")))

    def _drop(self, job: Job) -> None:
        if self._making.pop(job, None) is not None:
            self._answers.cancel(job)
