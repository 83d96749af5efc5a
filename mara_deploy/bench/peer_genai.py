"""ONNX Runtime GenAI as a peer of the benchmark: its model folder, driven by JSON lines.

    python peer_genai.py MODEL_FOLDER [--threads N]

Runs by the interpreter of an environment that has onnxruntime-genai, so it imports nothing of this project. It prints
`{"name": ..., "versions": {...}, "ready": true}`, then answers each JSON line of stdin with one of stdout:

    {"do": "decode", "context": C, "tokens": N}   {"ms": [of each step]}
    {"do": "prefill", "tokens": N}                {"ms": from the prompt to the first token}
    {"do": "memory"}                              {"peak_bytes": ..., "current_bytes": ...}

What goes wrong is answered with `{"error": "one line"}`.
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

import numpy as np

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read when the library is loaded

import onnxruntime_genai as og  # type: ignore[import-not-found]

SEED = 0


class Peer:
    """A model of GenAI and the generator whose cache the last decoding left."""

    def __init__(self, folder: Path, threads: int | None):
        config = og.Config(str(folder))
        if threads is not None:
            options = {"intra_op_num_threads": threads}
            config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self.model = og.Model(config)
        settings = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
        self.vocab_size = int(settings["model"]["vocab_size"])
        self.generator: Any = None
        self.context = 0
        self.max_length = 0

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """What to answer to a request."""
        what = request.get("do")
        if what == "decode":
            return {"ms": self.decode(int(request["context"]), int(request["tokens"]))}
        if what == "prefill":
            return {"ms": self.prefill(int(request["tokens"]))}
        if what == "memory":
            return memory()
        raise ValueError(f"no such request: {what!r}")

    def decode(self, context: int, tokens: int) -> list[float]:
        """Times of greedy steps, in ms, with `context` tokens cached before the first one.

        A step computes the logits of the newest token and chooses the next. In the first, the newest is a random one:
        the choice that ends the prompt is not made, so that all steps do the same work.
        """
        if context < 1 or tokens < 1:
            raise ValueError("context and tokens must be at least 1")
        prompt = self.random_tokens(context + 1)
        length = context + 1 + tokens
        if self.generator is not None and context == self.context and length < self.max_length:
            self.generator.rewind_to(context)
        else:
            self.generator = None  # its cache is freed before the next one is allocated
            generator = self.new_generator(length + 1)
            generator.append_tokens(prompt[:context])
            self.generator, self.context, self.max_length = generator, context, length + 1

        generator = self.generator
        clock = time.perf_counter
        times = []
        start = clock()
        generator.append_tokens(prompt[context:])
        generator.generate_next_token()
        times.append(clock() - start)
        for _ in range(tokens - 1):
            start = clock()
            generator.generate_next_token()
            times.append(clock() - start)
        if generator.token_count() != length:
            raise RuntimeError(f"decoding stopped at {generator.token_count()} tokens of {length}")
        return [round(t * 1e3, 4) for t in times]

    def prefill(self, tokens: int) -> float:
        """Time in ms that a new generator, once constructed, takes to the first token after a prompt."""
        if tokens < 1:
            raise ValueError("tokens must be at least 1")
        self.generator = None
        prompt = self.random_tokens(tokens)
        generator = self.new_generator(tokens + 2)
        start = time.perf_counter()
        generator.append_tokens(prompt)
        generator.generate_next_token()
        return round((time.perf_counter() - start) * 1e3, 4)

    def new_generator(self, max_length: int) -> Any:
        """A greedy generator that end-of-sequence does not stop. It allocates its cache for `max_length` tokens."""
        params = og.GeneratorParams(self.model)
        params.set_search_options(
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            past_present_share_buffer=True,
            min_length=max_length,
            max_length=max_length,
        )
        return og.Generator(self.model, params)

    def random_tokens(self, count: int) -> Any:
        """The first `count` of a fixed sequence of token ids."""
        return np.random.default_rng(SEED).integers(0, self.vocab_size, count, dtype=np.int32)


def memory() -> dict[str, Any]:
    """Resident memory of this process: the most it had, and what it has."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    sizes = {key: value for key, _, value in (line.partition(":") for line in lines)}
    return {
        "peak_bytes": int(sizes["VmHWM"].split()[0]) * 1024,
        "current_bytes": int(sizes["VmRSS"].split()[0]) * 1024,
    }


def one_line(error: BaseException) -> str:
    """An error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def main() -> int:
    """Answer requests until stdin ends."""
    parser = argparse.ArgumentParser(description="Answer the benchmark's requests with ONNX Runtime GenAI.")
    parser.add_argument("folder", type=Path, help="folder that GenAI's model builder wrote")
    parser.add_argument("--threads", type=int, help="intra-op threads; without it, what the engine chooses")
    arguments = parser.parse_args()

    # the protocol keeps stdout for itself: what a native library prints goes to stderr
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def send(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    try:
        peer = Peer(arguments.folder, arguments.threads)
    except Exception as error:
        send({"error": one_line(error)})
        return 1
    versions = {name: version(name) for name in ("onnxruntime-genai", "onnxruntime", "numpy")}
    send({"name": "onnxruntime-genai", "versions": versions, "ready": True})
    for line in sys.stdin:
        if not line.strip():
            continue
        try:
            send(peer.answer(json.loads(line)))
        except Exception as error:
            send({"error": one_line(error)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
