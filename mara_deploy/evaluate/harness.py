"""Bundles as a model of lm-eval, EleutherAI's evaluation harness: importing this module registers `mara-bundle`.

lm-eval looks for no entry points, so its own command does not know the model; `mara-eval --lm-eval` and this do:

    import lm_eval
    import mara_deploy.evaluate.harness
    lm_eval.simple_evaluate("mara-bundle", "bundle=qwen2-aligned,threshold=0.5", ["gsm8k"])
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from mara_runtime.config import CONVERSATIONS, DecodeConfig
from mara_runtime.decoder import AlignedDecoder
from mara_runtime.errors import BundleError, MaraError, OptionError
from mara_runtime.likelihood import likelihood

MOST_TOKENS = 256
"""Of an answer where the task sets no limit, as in lm-eval's other models."""


@register_model("mara-bundle")
class BundleModel(TemplateLM):  # type: ignore[misc]
    """A bundle, aligned or with align=False the LLM alone.

    bundle: folder, or an open decoder; engine, threads, verify: of one that is opened. batch_size: conversations that
    are decoded at once. template: variables of the chat template. decoding: of `DecodeConfig`; `agents` may also be
    the name of one.
    """

    def __init__(
        self,
        bundle: str | AlignedDecoder,
        *,
        engine: str = "auto",
        threads: int | None = None,
        verify: bool = True,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        max_gen_toks: int = MOST_TOKENS,
        template: Mapping[str, Any] | None = None,
        **decoding: Any,
    ) -> None:
        super().__init__()
        if device is not None:
            raise OptionError(f"device is {device!r}, and a bundle runs on its engine: give engine=cuda, say")
        opened = bundle if isinstance(bundle, AlignedDecoder) else None
        self.decoder = opened or AlignedDecoder(str(bundle), engine=engine, threads=threads, verify=verify)
        if self.decoder.text_side is None:
            raise BundleError(f"{self.decoder.bundle.folder} has no tokenizer: export a model folder that has one")
        self._side, self._manifest = self.decoder.text_side, self.decoder.bundle.manifest
        if isinstance(name := decoding.get("agents"), str):
            decoding["agents"] = {name: 1.0}
        try:
            self._config = self.decoder.resolve(DecodeConfig(**decoding))
        except TypeError:
            known = ", ".join(DecodeConfig.__dataclass_fields__)
            raise OptionError(f"unknown among {', '.join(decoding)}: decoding has {known}") from None
        self._conversations = batch_size if isinstance(batch_size, int) else CONVERSATIONS
        self._most, self._template = max_gen_toks, template

    # ── text and tokens ──────────────────────────────────────────────────────────────────────────────────────────────

    def _special(self, name: str) -> str | None:
        facts = self._manifest.tokenizer
        value = None if facts is None else facts.special_tokens.get(name)
        return value if isinstance(value, str) else None

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's end of text, else the first that ends an answer."""
        token = self._special("eos_token")
        found = None if token is None else self._side.tokenizer.token_to_id(token)
        return self._manifest.model.eos_token_ids[0] if found is None else int(found)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context: the beginning of text, else its end."""
        token = self._special("bos_token")
        found = None if token is None else self._side.tokenizer.token_to_id(token)
        return self.eot_token_id if found is None else int(found)

    @property
    def max_length(self) -> int:
        """Tokens of prompt and answer together."""
        return self._manifest.max_context

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids, with the special tokens that the tokenizer adds, unless the text begins with one of them."""
        if add_special_tokens is None:
            first = self._side.tokenizer.id_to_token(self.prefix_token_id)
            add_special_tokens = not string.startswith(first)
        return list(self._side.tokenizer.encode(string, add_special_tokens=add_special_tokens).ids)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation; without a generation prompt, its last message is the answer's beginning."""
        variables = self.decoder.variables(self._template, self._config.agents)
        begun = not add_generation_prompt
        return self._side.template.render(chat_history, variables, continue_final_message=begun)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """SHA-256 of the chat template, which lm-eval records; None where there is none, or it is not used."""
        facts = self._manifest.tokenizer
        used = chat_template and facts is not None and facts.chat_template is not None
        return self.tokenizer_name if used else None

    @property
    def tokenizer_name(self) -> str:
        """Of the bundle: prompts that lm-eval keeps depend on the files that its manifest lists."""
        digest = hashlib.sha256(self._manifest.to_json().encode()).hexdigest()
        return f"{self._manifest.model.name.replace('/', '__')}-{digest[:16]}"

    # ── what tasks ask for ───────────────────────────────────────────────────────────────────────────────────────────

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """(request, context, continuation) → the continuation's log-probability, and whether it is the greedy one."""
        if self._config.align:
            raise OptionError(
                "the task asks for log-likelihoods, and aligned decoding has none: it emits one token after each "
                "text. Ask the LLM alone, with align=False (--no-align), or choose a task that generates"
            )
        found: dict[int, tuple[float, bool]] = {}
        order = sorted(range(len(requests)), key=lambda i: [*requests[i][1], *requests[i][2]])  # which share beginnings
        for i in tqdm(order, desc="log-likelihoods", disable=disable_tqdm or None):
            text, context, continuation = requests[i]
            tokens = [*context, *continuation][-self.max_length - 1 :]
            said = likelihood(self.decoder, tokens, len(tokens) - len(continuation))
            found[i] = float(said.log_probabilities.sum(dtype=float)), bool(said.best.all())
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, found[i])
        return [found[i] for i in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each whole text, a window of `max_length` tokens after the other."""
        windows = [
            (number, *make_disjoint_window(window))
            for number, request in enumerate(requests)
            for window in get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1
            )
        ]
        said = self._loglikelihood_tokens([(None, *window) for _, *window in windows], disable_tqdm)
        sums = [0.0] * len(requests)
        for (number, *_), (log_probability, _) in zip(windows, said, strict=True):
            sums[number] += log_probability
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers, up to the stop texts of the task; several at once. Raises the first answer's error, if there is."""
        prompts, configs = [], []
        for request in requests:
            text, given = request.args
            options = normalize_gen_kwargs(given, self._most)
            if options["do_sample"]:
                raise OptionError(
                    "the task samples its answers, and bundles answer it by one rule: set do_sample: false"
                )
            length = min(options["max_gen_toks"], self.max_length - 1)
            prompts.append(self.tok_encode(text)[length - self.max_length :])
            configs.append(replace(self._config, max_new_tokens=length, stop=tuple(filter(None, options["until"]))))
        answers = [""] * len(requests)
        with tqdm(total=len(requests), desc="answers", disable=disable_tqdm or None) as bar:
            for index, piece in self.decoder.generate_many(prompts, configs, places=self._conversations):
                if isinstance(piece, MaraError):
                    raise piece
                if piece.result is not None:
                    answers[index] = piece.result.text or ""
                    self.cache_hook.add_partial("generate_until", requests[index].args, answers[index])
                    bar.update()
        return answers
