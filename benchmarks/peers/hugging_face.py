"""Hugging Face eager in float32 as a contestant of mara-bench.

    mara-bench BUNDLE --peer hugging-face="python benchmarks/peers/hugging_face.py CHECKPOINT_FOLDER"

It also decodes with alignment as MARA's released code does, one forward pass per candidate (`serial`), with the
decisions of synthetic acceptance.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from mara_deploy.bench.protocol import command_line, random_tokens, serve
from mara_deploy.bench.synthetic import Profile, Script
from mara_runtime.candidates import select
from mara_runtime.versions import installed


class HuggingFace:
    """A model and the KV cache of one sequence."""

    def __init__(self, folder: str, threads: int | None) -> None:
        if threads:
            torch.set_num_threads(threads)
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
        )
        self._model.eval()
        self._context, self._cache = -1, DynamicCache()

    def describe(self) -> dict[str, Any]:
        """Name and versions; serial: see protocol.py."""
        return {"name": "hugging-face-eager", "serial": True, "versions": installed("torch", "transformers")}

    @torch.no_grad()
    def _fill(self, context: int) -> None:
        if self._context != context:
            ids = random_tokens(context, self._model.config.vocab_size)
            self._cache = self._model(torch.tensor(ids)[None], use_cache=True).past_key_values
            self._context = context
        self._shorten(context)

    def _shorten(self, length: int) -> None:
        if (more := self._cache.get_seq_length() - length) > 0:
            self._cache.crop(-more)  # transformers 5 takes no length

    @torch.no_grad()
    def _step(self, token: int) -> torch.Tensor:
        out = self._model(
            torch.tensor([[token]]), past_key_values=self._cache, use_cache=True, output_hidden_states=True
        )
        logits: torch.Tensor = out.logits[0, -1]
        return logits

    def decode(self, context: int, tokens: int) -> dict[str, Any]:
        """Each step runs the most likely token of the one before; the first runs token 0."""
        self._fill(context)
        token, times = 0, []
        for _ in range(tokens):
            started = time.perf_counter()
            token = int(self._step(token).argmax())
            times.append((time.perf_counter() - started) * 1e3)
        return {"ms": times}

    def prefill(self, tokens: int) -> dict[str, Any]:
        """With an empty KV cache."""
        self._context = -1
        started = time.perf_counter()
        self._fill(tokens)
        return {"ms": (time.perf_counter() - started) * 1e3}

    def serial(self, profile: dict[str, Any], context: int, tokens: int) -> dict[str, Any]:
        """Aligned decoding with one forward pass for each examined candidate."""
        vocab_size = self._model.config.vocab_size
        script = Script(Profile(**profile), context + tokens + 1, vocab_size, 48)
        self._fill(context)
        started = time.perf_counter()
        for position in range(context, context + tokens):
            ids, logits = script.candidates(position)
            candidates = select(ids, logits, 0.0, 40, 0.95).ids
            for token in candidates:
                self._shorten(position)
                self._step(int(token))
                if len(candidates) == 1 or script.accepts(position, int(token)):
                    break
        return {"ms": (time.perf_counter() - started) * 1e3}


def main() -> None:
    """Entry point of the process."""
    args = command_line().parse_args()
    serve(lambda: HuggingFace(args.model, args.threads))


if __name__ == "__main__":
    main()
