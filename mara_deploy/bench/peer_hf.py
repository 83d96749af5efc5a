"""Hugging Face eager as a contestant: the released code's way, one candidate a forward pass. Protocol: worker.py."""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache

from mara_deploy.bench.profile import Profile, Script
from mara_deploy.bench.worker import Subject, serve
from mara_runtime.candidates import select


class HuggingFace:
    """A model in float32 with eager attention."""

    memory = Subject.memory

    def __init__(self, folder: str, threads: int | None) -> None:
        if threads:
            torch.set_num_threads(threads)
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
        )
        self._model.eval()  # type: ignore[no-untyped-call]
        self._context, self._cache = -1, DynamicCache()

    @torch.no_grad()
    def _fill(self, context: int) -> None:
        if self._context != context:
            ids = np.random.default_rng(context).integers(0, self._model.config.vocab_size, context)
            self._cache = self._model(torch.tensor(ids)[None], use_cache=True).past_key_values
            self._context = context
        self._cache.crop(context)

    @torch.no_grad()
    def _step(self, token: int) -> torch.Tensor:
        out = self._model(
            torch.tensor([[token]]), past_key_values=self._cache, use_cache=True, output_hidden_states=True
        )
        logits: torch.Tensor = out.logits[0, -1]
        return logits

    def decode(self, context: int, tokens: int) -> dict[str, Any]:
        """See worker.py."""
        self._fill(context)
        token, times = 0, []
        for _ in range(tokens):
            started = time.perf_counter()
            token = int(self._step(token).argmax())
            times.append((time.perf_counter() - started) * 1e3)
        return {"ms": times}

    def prefill(self, tokens: int) -> dict[str, Any]:
        """See worker.py."""
        self._context = -1
        started = time.perf_counter()
        self._fill(tokens)
        return {"ms": (time.perf_counter() - started) * 1e3}

    def serial(self, profile: dict[str, Any], context: int, tokens: int) -> dict[str, Any]:
        """Aligned decoding as the released code does it: a forward for every examined candidate, one after another."""
        vocab_size = self._model.config.vocab_size
        script = Script(Profile(**profile), context + tokens + 1, vocab_size, 48)
        self._fill(context)
        forwards = 0
        started = time.perf_counter()
        for position in range(context, context + tokens):
            ids, logits = script.candidates(position)
            candidates = select(ids, logits, 0.0, 40, 0.95).ids
            for token in candidates:
                self._cache.crop(position)
                self._step(int(token))
                forwards += 1
                if len(candidates) == 1 or script.accepts(position, int(token)):
                    break
        return {"ms": (time.perf_counter() - started) * 1e3, "forwards": forwards}


def main() -> None:
    """Entry point of the process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    serve(HuggingFace(args.model, args.threads), {"name": "hugging-face-eager", "versions": versions})


if __name__ == "__main__":
    main()
