"""llama.cpp as a peer of the benchmark: a GGUF file, driven by JSON lines.

    python peer_llama.py FILE.gguf [--threads N]

Runs by the interpreter of an environment that has llama-cpp-python, so it imports nothing of this project. The
requests are those of peer_genai.py: decode, prefill, memory.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llama_cpp as llama  # type: ignore[import-not-found]
import numpy as np

CAPACITY = 4096 + 512
"""Tokens of the KV cache; the longest context of the benchmark and what is decoded after it."""
BATCH = 512


class Peer:
    """A model with one sequence."""

    def __init__(self, file: Path, threads: int | None):
        llama.llama_backend_init()
        self._model = llama.llama_model_load_from_file(str(file).encode(), llama.llama_model_default_params())
        if not self._model:
            raise ValueError(f"llama.cpp cannot load {file.name}")
        params = llama.llama_context_default_params()
        params.n_ctx, params.n_batch = CAPACITY, BATCH
        if threads:
            params.n_threads = params.n_threads_batch = threads
        self._context = llama.llama_init_from_model(self._model, params)
        self._vocab_size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))
        self._held = -1  # tokens of context in the cache

    def decode(self, context: int, tokens: int) -> dict[str, Any]:
        """Times of greedy steps, in ms, with `context` tokens cached before the first one."""
        prompt = self._random_tokens(context + 1)
        if self._held != context:
            self._keep(0)
            self._run(prompt[:context])
            self._held = context
        self._keep(context)
        token, times = prompt[-1], []
        for _ in range(tokens):
            start = time.perf_counter()
            self._run([token])
            token = self._best()
            times.append((time.perf_counter() - start) * 1e3)
        return {"ms": times}

    def prefill(self, tokens: int) -> dict[str, Any]:
        """Time in ms to the first token after a prompt."""
        prompt = self._random_tokens(tokens)
        self._keep(0)
        self._held = -1
        start = time.perf_counter()
        self._run(prompt)
        self._best()
        return {"ms": (time.perf_counter() - start) * 1e3}

    def memory(self) -> dict[str, Any]:
        """Resident memory of this process: the most it had, and what it has."""
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        sizes = {key: value for key, _, value in (line.partition(":") for line in lines)}
        return {
            "peak_bytes": int(sizes["VmHWM"].split()[0]) * 1024,
            "current_bytes": int(sizes["VmRSS"].split()[0]) * 1024,
        }

    def _keep(self, count: int) -> None:
        """Leave the first `count` tokens in the cache."""
        llama.llama_memory_seq_rm(llama.llama_get_memory(self._context), 0, count, -1)

    def _run(self, tokens: list[int]) -> None:
        for start in range(0, len(tokens), BATCH):
            part = tokens[start : start + BATCH]
            ids = (llama.llama_token * len(part))(*part)  # the batch points to it
            batch = llama.llama_batch_get_one(ids, len(part))
            if llama.llama_decode(self._context, batch) != 0:
                raise RuntimeError("llama_decode failed")

    def _best(self) -> int:
        logits = llama.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, (self._vocab_size,)).argmax())

    def _random_tokens(self, count: int) -> list[int]:
        tokens: list[int] = np.random.default_rng(0).integers(0, self._vocab_size, count).tolist()
        return tokens


def main() -> int:
    """Answer requests until stdin ends."""
    parser = argparse.ArgumentParser(description="Answer the benchmark's requests with llama.cpp.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()

    # the protocol keeps stdout for itself: what the library prints goes to stderr, and is not wanted there either
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    silence = llama.llama_log_callback(lambda *_: None)
    llama.llama_log_set(silence, None)

    def send(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    try:
        peer = Peer(arguments.file, arguments.threads)
    except Exception as error:
        send({"error": " ".join(f"{type(error).__name__}: {error}".split())})
        return 1
    system = llama.llama_print_system_info().decode().strip()
    send({"name": "llama.cpp", "versions": {"llama-cpp-python": version("llama-cpp-python")}, "system": system})
    for line in sys.stdin:
        request = json.loads(line)
        what = request.pop("do")
        try:
            if what not in ("decode", "prefill", "memory"):
                raise ValueError(f"no such request: {what!r}")
            send(getattr(peer, what)(**request))
        except Exception as error:
            send({"error": " ".join(f"{type(error).__name__}: {error}".split())})
    return 0


if __name__ == "__main__":
    sys.exit(main())
