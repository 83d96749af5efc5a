"""ONNX Runtime GenAI as a contestant, see protocol.py.

    python peer_genai.py MODEL_FOLDER [--threads N]

Runs by the interpreter of an environment that has onnxruntime-genai, so it imports nothing else of this project.
"""

from __future__ import annotations

import json
import os
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read when the library is loaded

import onnxruntime_genai as og  # type: ignore[import-not-found]
from protocol import command_line, random_tokens, serve  # type: ignore[import-not-found]


class GenAI:
    """A model of GenAI and the generator whose cache the last decoding left."""

    def __init__(self, folder: Path, threads: int | None):
        config = og.Config(str(folder))
        if threads is not None:
            options = {"intra_op_num_threads": threads}
            config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._model = og.Model(config)
        settings = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
        self._vocab_size = int(settings["model"]["vocab_size"])
        self._generator: Any = None
        self._context = 0
        self._max_length = 0

    def describe(self) -> dict[str, Any]:
        """What is measured."""
        versions = {name: version(name) for name in ("onnxruntime-genai", "onnxruntime", "numpy")}
        return {"name": "onnxruntime-genai", "versions": versions}

    def decode(self, context: int, tokens: int) -> dict[str, Any]:
        """A step computes the logits of the newest token and chooses the next.

        In the first, the newest is a random one: the choice that ends the prompt is not made, so that all steps do
        the same work.
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
        """By a new generator, once that is constructed."""
        self._generator = None
        prompt = self._prompt(tokens)
        generator = self._new_generator(tokens + 2)
        start = time.perf_counter()
        generator.append_tokens(prompt)
        generator.generate_next_token()
        return {"ms": (time.perf_counter() - start) * 1e3}

    def _prompt(self, length: int) -> Any:
        return np.array(random_tokens(length, self._vocab_size), np.int32)

    def _new_generator(self, max_length: int) -> Any:
        """A greedy generator that end-of-sequence does not stop. It allocates its cache for `max_length` tokens."""
        params = og.GeneratorParams(self._model)
        params.set_search_options(
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            past_present_share_buffer=True,
            min_length=max_length,
            max_length=max_length,
        )
        return og.Generator(self._model, params)


def main() -> None:
    """Entry point of the process."""
    args = command_line().parse_args()
    serve(lambda: GenAI(Path(args.model), args.threads))


if __name__ == "__main__":
    main()
