"""ONNX Runtime GenAI as a contestant of mara-bench.

    mara-bench BUNDLE --peer genai="GENAI_ENV/bin/python benchmarks/peers/genai.py MODEL_FOLDER"

Runs in an environment that has onnxruntime-genai and need not have mara-deploy.
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read when the library loads

import onnxruntime_genai as og

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout, which need not be installed here
from mara_deploy.bench.protocol import command_line, random_tokens, serve

MOST = 32
"""Conversations at once, in a static batch: dynamic ones need a paged cache, which models for a CPU do not have."""


class GenAI:
    """A model, and the generator with the KV cache of the last request."""

    def __init__(self, folder: Path, threads: int | None):
        config = og.Config(str(folder))
        config.overlay(json.dumps({"engine": {"static_batching": {"max_batch_size": MOST}}}))
        if threads is not None:
            options = {"intra_op_num_threads": threads}
            config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._model = og.Model(config)
        settings = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
        self._vocab_size = int(settings["model"]["vocab_size"])
        self._generator: Any = None
        self._engine: Any = None
        self._context = 0
        self._max_length = 0

    def describe(self) -> dict[str, Any]:
        """Name and versions."""
        versions = {name: version(name) for name in ("onnxruntime-genai", "onnxruntime", "numpy")}
        return {"name": "onnxruntime-genai", "versions": versions, "conversations": MOST}

    def decode(self, context: int, tokens: int) -> dict[str, Any]:
        """A step computes the logits of the newest token and chooses the next one.

        In the first step the newest token is random, rather than chosen after the prompt: all steps do the same work.
        """
        prompt = self._prompt(context + 1)
        length = context + 1 + tokens
        if self._generator is not None and context == self._context and length < self._max_length:
            self._generator.rewind_to(context)
        else:
            self._generator = None  # its cache is freed before the next one is allocated
            generator = self._new_generator(length + 1)
            generator.append_tokens(prompt[:context])
            self._generator, self._context, self._max_length = generator, context, length + 1

        generator = self._generator
        clock = time.perf_counter
        times = []
        start = clock()
        generator.append_tokens(prompt[context:])
        generator.generate_next_token()
        times.append((clock() - start) * 1e3)
        for _ in range(tokens - 1):
            start = clock()
            generator.generate_next_token()
            times.append((clock() - start) * 1e3)
        if generator.token_count() != length:
            raise RuntimeError(f"decoding stopped at {generator.token_count()} tokens of {length}")
        return {"ms": times}

    def prefill(self, tokens: int) -> dict[str, Any]:
        """With a new generator; its construction is not counted."""
        self._generator = None
        prompt = self._prompt(tokens)
        generator = self._new_generator(tokens + 2)
        start = time.perf_counter()
        generator.append_tokens(prompt)
        generator.generate_next_token()
        return {"ms": (time.perf_counter() - start) * 1e3}

    def together(self, conversations: int, context: int, tokens: int) -> dict[str, Any]:
        """The engine's batching of requests, while all are there."""
        self._generator = None
        self._engine = engine = self._engine or og.Engine(self._model)
        events = engine.create_event_buffer(MOST)
        requests = [engine.create_request() for _ in range(conversations)]
        limit = 2 * tokens + conversations  # those admitted first are ahead
        for number, request in enumerate(requests):
            options = og.TurnOptions(request)
            options.set_do_sample(False)
            options.set_max_generated_tokens(limit)
            options.set_min_generated_tokens(limit)
            request.begin_turn(self._prompt(context + number)[:context], options)
        emitted = [0] * conversations
        started, before = time.perf_counter(), 0
        while sum(emitted) - before < tokens * conversations and max(emitted) < limit:
            for event in engine.run(events):
                if event.flags & og.EngineEventFlags.FAILED:
                    raise RuntimeError(f"a request failed: {event.error_code}")
                emitted[requests.index(event.request)] += bool(event.flags & og.EngineEventFlags.TOKEN)
            if not before and min(emitted):
                started, before = time.perf_counter(), sum(emitted)
        ms = (time.perf_counter() - started) * 1e3
        for request in requests:
            request.close()
        return {"tokens": sum(emitted) - before, "ms": ms}

    def _prompt(self, length: int) -> Any:
        return np.array(random_tokens(length, self._vocab_size), np.int32)

    def _new_generator(self, max_length: int) -> Any:
        """It allocates its KV cache for `max_length` tokens."""
        return og.Generator(self._model, self._params(max_length, past_present_share_buffer=True))

    def _params(self, max_length: int, **options: Any) -> Any:
        """Greedy search that ignores end-of-sequence."""
        params = og.GeneratorParams(self._model)
        params.set_search_options(
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            min_length=max_length,
            max_length=max_length,
            **options,
        )
        return params


def main() -> None:
    """Entry point of the process."""
    args = command_line().parse_args()
    serve(lambda: GenAI(Path(args.model), args.threads))


if __name__ == "__main__":
    main()
