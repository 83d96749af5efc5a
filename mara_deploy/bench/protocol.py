"""How a contestant of the benchmark is asked: a process that answers each JSON line of stdin with one of stdout.

It is started with its model and perhaps `--threads N`, and first says what it is: `{"name": ..., "versions": {...}}`.

    {"do": "decode", "context": C, "tokens": N}   {"ms": [of each plain greedy step, C tokens cached before the first]}
    {"do": "prefill", "tokens": N}                {"ms": from a prompt, of which nothing is held, to the first token}
    {"do": "memory"}                              {"peak_bytes": of this process, since its start}

and what else it has methods for. What goes wrong is answered with `{"error": "one line"}`.

Peers run by the interpreter of an environment of their own, which has not got this project, and import this file as
the one beside them: it needs NumPy alone, and no file of this folder may be named as a module that somebody imports.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def command_line() -> argparse.ArgumentParser:
    """The command line of a contestant."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", help="file or folder")
    parser.add_argument("--threads", type=int, help="without it, what the engine chooses")
    return parser


def serve(start: Callable[[], Any], told: tuple[type[Exception], ...] = ()) -> None:
    """Answer requests with the methods of what `start` returns, until the input ends; its `describe` says what it is.

    told: errors whose text says enough without their type.
    """
    # the protocol keeps stdout for itself: what a native library prints goes to stderr
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def send(value: dict[str, Any]) -> None:
        print(json.dumps(value), file=answers, flush=True)

    def failure(error: Exception) -> dict[str, Any]:
        kind = "" if isinstance(error, told) else f"{type(error).__name__}: "
        return {"error": " ".join(f"{kind}{error}".split())}

    try:
        contestant = start()
        about = contestant.describe()
    except Exception as error:
        send(failure(error))
        return
    send(about)
    for line in sys.stdin:
        request = json.loads(line)
        what = request.pop("do")
        try:
            found = memory() if what == "memory" else getattr(contestant, what)(**request)
        except Exception as error:  # whatever happens in a contestant is reported, not raised
            found = failure(error)
        send(found)


def memory() -> dict[str, Any]:
    """The most that this process had resident."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return {"peak_bytes": int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024}  # type: ignore[index]


def random_tokens(count: int, vocab_size: int) -> list[int]:
    """A prompt; no length's begins as another's, so that no KV cache holds a part of it from before."""
    tokens: list[int] = np.random.default_rng(count).integers(0, vocab_size, count).tolist()
    return tokens
