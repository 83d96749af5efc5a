"""The server's routes, as an ASGI application."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, NoReturn

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from mara_deploy.serve import openapi, requests
from mara_deploy.serve.errors import ApiError, as_api_error
from mara_deploy.serve.formats import ChatFormat, CompletionFormat, Format
from mara_deploy.serve.keys import Keys
from mara_deploy.serve.log import Log, Logged
from mara_deploy.serve.metrics import Metrics
from mara_deploy.serve.requests import Ask, Model
from mara_deploy.serve.responses import ResponseFormat
from mara_deploy.serve.settings import ServeSettings
from mara_deploy.serve.stream import EventStream, as_json, events, unless_gone
from mara_deploy.serve.worker import PendingAnswer, Worker
from mara_runtime.answer import Generation, Piece
from mara_runtime.errors import MaraError, OptionError

Parse = Callable[[Any, Any], Ask]
ENDPOINTS: dict[str, tuple[Parse, type[Format]]] = {
    "/v1/chat/completions": (requests.chat, ChatFormat),
    "/v1/completions": (requests.completion, CompletionFormat),
    "/v1/responses": (requests.response, ResponseFormat),
}
PROBES = ("/health", "/ready", "/metrics")
_READ_ON = 16
"""Times the largest body: of a larger one, so much is read before it is refused."""
BODY_S = 30
"""Seconds that a client may take to send a request's body."""
READER_S = 60
"""Seconds that it may take to read an answer, beyond those that the answer may take."""


class Server:
    """Workers and what serves them.

    keys: None, everybody may ask. log: takes a line about each request, as a dictionary. Raises OptionError for two
    models of one name.
    """

    def __init__(self, workers: Sequence[Worker], settings: ServeSettings, log: Log, keys: Keys | None = None) -> None:
        self.settings, self.log, self.keys = settings, log, keys
        self.workers = {worker.name: worker for worker in workers}
        self.models: dict[str, Model] = {}
        for worker in workers:
            agents = tuple(agent.name for agent in worker.manifest.agents)
            for agent in (None, *agents):
                name = worker.name if agent is None else f"{worker.name}:{agent}"
                if name in self.models:
                    raise OptionError(f"two models have the name {name}: rename a bundle's folder")
                self.models[name] = Model(name, worker.name, agents, worker.manifest.max_context, agent)
        self.metrics = Metrics(workers)
        self.draining = False
        self.started = int(time.time())

    def drain(self) -> None:
        """Refuse new requests; end those there are, or let them end, in time."""
        self.draining = True
        for worker in self.workers.values():
            worker.drain(self.settings.grace_s)

    @property
    def drained(self) -> bool:
        """Whether it refuses new requests, and there are no others."""
        return self.draining and all(worker.idle for worker in self.workers.values())

    def app(self) -> Starlette:
        """The application; its lifespan is that of the workers' threads."""
        middleware = [Middleware(Logged, log=self.log, count=self.metrics.requests, endpoints=ENDPOINTS, quiet=PROBES)]
        if self.settings.cors:
            origins = list(self.settings.cors)
            middleware.append(
                Middleware(CORSMiddleware, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"])
            )
        return Starlette(
            routes=[
                *[Route(path, self._answer, methods=["POST"]) for path in ENDPOINTS],
                Route("/v1/models", self._list_models),
                Route("/v1/models/{model:path}", self._show_model),
                Route("/openapi.json", self._document),
                Route("/health", self._health),
                Route("/ready", self._ready),
                Route("/metrics", self._metrics),
            ],
            middleware=middleware,
            exception_handlers={ApiError: _refuse, HTTPException: _refuse_http, Exception: _refuse},
            lifespan=self._lifespan,
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        for worker in self.workers.values():
            worker.start()
        try:
            yield
        finally:
            for worker in self.workers.values():
                worker.close()

    # ── routes ───────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _answer(self, request: Request) -> Response:
        self._admit(request)
        if self.draining:
            raise ApiError(503, "shutting_down", "the server is shutting down", retry_after_s=10)
        parse, format_of = ENDPOINTS[request.url.path]
        facts: dict[str, Any] = request.scope["facts"]
        try:
            ask = parse(await self._json(request), self.models)
            facts |= {"model": ask.model.id, "stream": ask.stream}
            if self.settings.log_prompts:
                facts["prompt"] = ask.prompt
            return await unless_gone(request, self._answered(ask, format_of, facts))
        except ClientDisconnect:
            facts["finish"] = "client_gone"
            return Response(status_code=499)
        except MaraError as error:
            raise as_api_error(error) from error

    async def _answered(self, ask: Ask, format_of: type[Format], facts: dict[str, Any]) -> Response:
        """The whole answer; or a stream, from its first piece on: an error before it has its own status."""
        worker = self.workers[ask.model.bundle]
        answer = await worker.ask(ask.prompt, ask.config, raw=ask.raw, template=ask.template)
        form = format_of(ask, worker.text_side)
        streaming = False
        try:
            pieces = [await anext(answer)]
            self._note_first(worker, answer, facts)

            def ended(result: Generation | ApiError) -> None:
                self._note_end(worker, answer, result, facts)

            if ask.stream:
                facts["finish"] = "client_gone"  # until it has ended otherwise
                content = events(form, pieces[0], answer, ended)
                response = EventStream(content, answer.close, self.settings.timeout_s + READER_S)
                streaming = True
                return response
            pieces += [piece async for piece in answer]
            ended(_result(pieces))
            return _json_response(form.whole(pieces))
        finally:
            if not streaming:
                answer.close()

    def _note_first(self, worker: Worker, answer: PendingAnswer, facts: dict[str, Any]) -> None:
        seconds = time.monotonic() - answer.started
        self.metrics.first(worker, seconds)
        facts["first_token_ms"] = round(seconds * 1e3, 1)

    def _note_end(
        self, worker: Worker, answer: PendingAnswer, result: Generation | ApiError, facts: dict[str, Any]
    ) -> None:
        if isinstance(result, ApiError):
            facts["finish"] = result.code
            return
        stats = result.stats
        self.metrics.answered(worker, result, time.monotonic() - answer.started)
        facts |= {
            "finish": result.finish_reason,
            "agents": result.config.agents if result.config.align else None,
            "prompt_tokens": stats.prompt_tokens,
            "cached_tokens": stats.reused_tokens,
            "completion_tokens": stats.tokens,
            "forced": stats.forced,
        }

    async def _list_models(self, request: Request) -> Response:
        self._admit(request)
        return _json_response({"object": "list", "data": [self._model(model) for model in self.models.values()]})

    async def _show_model(self, request: Request) -> Response:
        self._admit(request)
        name = request.path_params["model"]
        if name not in self.models:
            raise ApiError(404, "model_not_found", f"the model {name!r} does not exist", param="model")
        return _json_response(self._model(self.models[name]))

    def _model(self, model: Model) -> dict[str, Any]:
        return {"id": model.id, "object": "model", "created": self.started, "owned_by": "mara-deploy"}

    async def _document(self, request: Request) -> Response:
        self._admit(request)
        return _json_response(openapi.document(self.models, keys=self.keys is not None))

    async def _health(self, _: Request) -> Response:
        alive = all(worker.alive for worker in self.workers.values())
        return _json_response({"status": "ok" if alive else "a worker has ended"}, 200 if alive else 503)

    async def _ready(self, _: Request) -> Response:
        return _json_response({"status": "shutting down" if self.draining else "ok"}, 503 if self.draining else 200)

    async def _metrics(self, _: Request) -> Response:
        return Response(self.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    # ── a request ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _admit(self, request: Request) -> None:
        """Raise ApiError for a request without a key, where there are keys."""
        if self.keys is not None and not self.keys.admit(request.headers.get("Authorization", "")):
            raise ApiError(401, "invalid_api_key", "the API key is missing or wrong: send Authorization: Bearer KEY")

    async def _json(self, request: Request) -> Any:
        """The body. A web page may send other types than JSON to any server without asking it (CORS)."""
        kind = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, "unsupported_media_type", f"Content-Type is {kind!r}; it must be application/json")
        try:
            body = await asyncio.wait_for(self._body(request), BODY_S)
        except asyncio.TimeoutError:
            raise ApiError(408, "timeout", f"the body did not arrive within {BODY_S} s") from None
        try:
            return json.loads(body, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            reason = " ".join(str(error).split())
            raise ApiError(400, "invalid_json", f"the body is not valid JSON: {reason}") from None

    async def _body(self, request: Request) -> bytes:
        """The body. Of one that is too large, more is read: who is cut off while writing sees no status."""
        most, body, size = self.settings.max_body_mib << 20, bytearray(), 0
        length = request.headers.get("Content-Length", "0")
        if not length.isdecimal() or int(length) <= _READ_ON * most:
            async for chunk in request.stream():
                size += len(chunk)
                if size <= most:
                    body += chunk
                elif size > _READ_ON * most:
                    break
            if size <= most:
                return bytes(body)
        raise ApiError(413, "body_too_large", f"the body has more than {self.settings.max_body_mib} MiB (--max-body)")


def _result(pieces: Sequence[Piece]) -> Generation:
    result = pieces[-1].result
    assert result is not None  # the last piece carries it
    return result


def _json_response(data: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(as_json(data), status, headers, media_type="application/json")


async def _refuse(request: Request, error: Exception) -> Response:
    told = as_api_error(error)
    request.scope["facts"]["error"] = told.code
    return _json_response(told.body(), told.status, told.headers)


async def _refuse_http(_: Request, error: Exception) -> Response:
    """Starlette's own errors, in the same form: no such path, no such method."""
    assert isinstance(error, HTTPException)
    told = ApiError(error.status_code, "not_found" if error.status_code == 404 else "bad_request", error.detail)
    return _json_response(told.body(), told.status, dict(error.headers or {}))


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
