"""The line protocol between mara-bench and its contestants.

A contestant is a process, started with `--threads N` appended to its command. It reads and writes one JSON object per
line, on stdin and stdout: first it writes what it is, then one answer for each request, until stdin ends.

    {"name": "llama.cpp", "versions": {"llama-cpp-python": "0.3"}}

    {"do": "decode", "context": C, "tokens": N}   {"ms": [N greedy steps, with C tokens cached before the first]}
    {"do": "prefill", "tokens": N}                {"ms": from an uncached prompt to its first token}
    {"do": "memory"}                              {"peak_bytes": largest resident size of the process so far}

A contestant that says `"conversations": N` decodes up to so many at once, and answers

    {"do": "together", "conversations": B, "context": C, "tokens": N}
                                                  {"ms": …, "tokens": … emitted in it, about N each, while all B decode}

A contestant that says `"serial": true` is slow: it is measured less often, only at the shortest context, and answers

    {"do": "serial", "profile": {...}, "context": C, "tokens": N}
                                                  {"ms": aligned decoding with one forward pass per candidate}

Errors are answered with `{"error": "one line"}`. A contestant written in Python needs only `command_line` and `serve`
of this module, which imports NumPy alone.
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
    parser.add_argument("--threads", type=int, help="default: chosen by the engine")
    return parser


def serve(start: Callable[[], Any], plain_errors: tuple[type[Exception], ...] = ()) -> None:
    """Answer requests with the methods of the object that `start` returns; its `describe` says what it is.

    plain_errors: errors that are reported without their type.
    """
    # stdout is for the protocol alone: what native libraries print goes to stderr
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def send(value: dict[str, Any]) -> None:
        print(json.dumps(value), file=answers, flush=True)

    def failure(error: Exception) -> dict[str, Any]:
        kind = "" if isinstance(error, plain_errors) else f"{type(error).__name__}: "
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
        name = request.pop("do")
        try:
            answer = memory() if name == "memory" else getattr(contestant, name)(**request)
        except Exception as error:  # reported to mara-bench
            answer = failure(error)
        send(answer)


def memory() -> dict[str, Any]:
    """The largest resident size of this process so far."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return {"peak_bytes": int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024}  # type: ignore[index]


def random_tokens(count: int, vocab_size: int) -> list[int]:
    """A random prompt. Prompts of different lengths share no prefix, which a KV cache could reuse."""
    tokens: list[int] = np.random.default_rng(count).integers(0, vocab_size, count).tolist()
    return tokens
