"""The HTTP server itself: uvicorn, which ends when the last answer is complete."""

from __future__ import annotations

import logging
import socket
from types import FrameType

import uvicorn

from mara_deploy.serve.app import Server

_HEADER_BYTES = 1 << 16
"""Of a request's line and headers at most."""
_FLUSH_S = 5
"""Seconds at the end in which clients may read what is left."""


class Uvicorn(uvicorn.Server):
    """Goes on serving after the first signal, so that new requests get status 503, until the server is drained."""

    def __init__(self, config: uvicorn.Config, server: Server) -> None:
        super().__init__(config)
        self._drains = server

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain; at the second signal, end now."""
        if self._drains.draining:
            super().handle_exit(sig, frame)
        else:
            self._drains.drain()

    async def on_tick(self, counter: int) -> bool:
        """Whether to end."""
        return await super().on_tick(counter) or self._drains.drained


def serve(server: Server, listener: socket.socket) -> None:
    """Serve until a signal has ended it. listener: bound."""
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of each client that goes away amid an answer
    config = uvicorn.Config(
        server.app(),
        http="h11",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=_HEADER_BYTES,
        timeout_graceful_shutdown=_FLUSH_S,
    )
    Uvicorn(config, server).run(sockets=[listener])
