"""llama.cpp with a GGUF file as a contestant of mara-bench.

    mara-bench BUNDLE --peer llama.cpp="LLAMA_ENV/bin/python benchmarks/peers/llamacpp.py FILE.gguf"

Runs in an environment that has llama-cpp-python and need not have mara-deploy.
"""

from __future__ import annotations

import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llama_cpp as llama
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout, which need not be installed here
from mara_deploy.bench.protocol import command_line, random_tokens, serve

CAPACITY = 4096 + 512
"""Size of the KV cache, in tokens: the longest context of mara-bench and what is decoded after it."""
BATCH = 512


class LlamaCpp:
    """A model and the KV cache of one sequence."""

    def __init__(self, file: Path, threads: int | None):
        self._silence = llama.llama_log_callback(lambda *_: None)  # discard its log
        llama.llama_log_set(self._silence, None)
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
        self._cached = -1  # tokens of context in the KV cache

    def describe(self) -> dict[str, Any]:
        """Name and versions."""
        versions = {"llama-cpp-python": version("llama-cpp-python")}
        return {"name": "llama.cpp", "versions": versions, "system": llama.llama_print_system_info().decode().strip()}

    def decode(self, context: int, tokens: int) -> dict[str, Any]:
        """The first step runs a random token, the others the most likely one."""
        prompt = random_tokens(context + 1, self._vocab_size)
        if self._cached != context:
            self._keep(0)
            self._run(prompt[:context])
            self._cached = context
        self._keep(context)
        token, times = prompt[-1], []
        for _ in range(tokens):
            start = time.perf_counter()
            self._run([token])
            token = self._best()
            times.append((time.perf_counter() - start) * 1e3)
        return {"ms": times}

    def prefill(self, tokens: int) -> dict[str, Any]:
        """With an empty KV cache."""
        prompt = random_tokens(tokens, self._vocab_size)
        self._keep(0)
        self._cached = -1
        start = time.perf_counter()
        self._run(prompt)
        self._best()
        return {"ms": (time.perf_counter() - start) * 1e3}

    def _keep(self, count: int) -> None:
        """Leave the first `count` tokens in the cache."""
        llama.llama_memory_seq_rm(llama.llama_get_memory(self._context), 0, count, -1)

    def _run(self, tokens: list[int]) -> None:
        for start in range(0, len(tokens), BATCH):
            part = tokens[start : start + BATCH]
            ids = (llama.llama_token * len(part))(*part)  # must outlive the batch, which points to it
            batch = llama.llama_batch_get_one(ids, len(part))
            if llama.llama_decode(self._context, batch) != 0:
                raise RuntimeError("llama_decode failed")

    def _best(self) -> int:
        logits = llama.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, (self._vocab_size,)).argmax())


def main() -> None:
    """Entry point of the process."""
    args = command_line().parse_args()
    serve(lambda: LlamaCpp(Path(args.model), args.threads))


if __name__ == "__main__":
    main()
