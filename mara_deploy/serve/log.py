"""A line about each request, and a count of it."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Container
from datetime import datetime, timezone
from typing import Any

from prometheus_client import Counter
from starlette.types import ASGIApp, Message, Receive, Scope, Send

Log = Callable[[dict[str, Any]], None]


class Logged:
    """Middleware: logs and counts each request when its response has ended, with what the route puts into "facts".

    quiet: paths whose successes are not logged.
    """

    def __init__(
        self, app: ASGIApp, *, log: Log, count: Counter, endpoints: Container[str], quiet: Container[str]
    ) -> None:
        self._app, self._log, self._count, self._endpoints, self._quiet = app, log, count, endpoints, quiet

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        facts: dict[str, Any] = {}
        scope["facts"] = facts
        identity, started, status = f"req_{uuid.uuid4().hex}", time.monotonic(), 500

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", identity.encode())]}
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            path = scope["path"]
            known = path in self._endpoints or path in self._quiet or path == "/v1/models"
            self._count.labels(path if known else "other", str(status)).inc()
            if path not in self._quiet or status >= 400:
                self._log(
                    {
                        "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
                        "request": identity,
                        "method": scope["method"],
                        "path": path[:200],
                        "status": status,
                        "ms": round((time.monotonic() - started) * 1e3, 1),
                        **facts,
                    }
                )
