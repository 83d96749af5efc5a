"""Settings of the server."""

from __future__ import annotations

from dataclasses import dataclass

from mara_runtime.config import CONVERSATIONS
from mara_runtime.options import Options, option


@dataclass(frozen=True)
class ServeSettings(Options):
    """What the server allows."""

    conversations: int = option(CONVERSATIONS, "answers decoded at once, per bundle", least=1)
    queue: int = option(64, "requests that may wait for a place, per bundle; others get status 429", least=0)
    timeout_s: float = option(
        600.0, "seconds from a request to the end of its answer", flag="--timeout", metavar="S", above=0
    )
    grace_s: float = option(
        30.0, "seconds that answers may still take after SIGTERM or Ctrl-C", flag="--grace", metavar="S", least=0
    )
    max_body_mib: int = option(4, "size of a request in MiB at most", flag="--max-body", metavar="MIB", least=1)
    cors: tuple[str, ...] = option(
        (), "web origin whose pages may send requests, as in https://example.com", metavar="ORIGIN"
    )
    log_prompts: bool = option(False, "log prompts, too: everybody's text, in full")
