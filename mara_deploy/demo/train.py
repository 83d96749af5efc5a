"""Remake the embedded demo LM from a seed: `python -m mara_deploy.demo.train [--out DIR] [--seed N] ...`.

A Qwen2-architecture LM with its own byte-level BPE tokenizer and chat template, trained from scratch on the
text that `mara_deploy.demo.corpus` generates. The corpus has no end, so every batch is new and there are no epochs.
About six minutes on one CPU core; the defaults of `Recipe` made the model in `mara_deploy/demo/model`.

Reproducibility: the same seed, steps, threads and package versions give the same bytes on the same machine
(tests/export/test_demo_lm.py). The corpus and the tokenizer depend on nothing else and are the same everywhere. The
weights may differ in the last bits, and after many steps visibly, where torch takes other kernels: on another
processor type, with another number of threads, with another torch version. The figures in recipe.json then move
a little; the recipe is meant to give an equally good model there, not the same one.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from mara_deploy.demo import corpus
from mara_runtime.candidates import select
from mara_runtime.errors import MaraError, OptionError

PAD, END_OF_TURN = "<|endoftext|>", "<|im_end|>"
MAX_NEW_TOKENS = 112
"""Longest answer that the measurements decode, tokens; the corpus's longest replies are shorter."""


@dataclass(frozen=True)
class Recipe:
    """Everything that the weights depend on, apart from machine and package versions."""

    seed: int = 0
    steps: int = 1400
    """optimizer steps, ≥ 1; the learning rate's schedule is a function of the step alone"""
    threads: int = 1
    """torch CPU threads, ≥ 1; a second one gains little at this size"""
    vocab_size: int = 1024
    """BPE tokens, the three special ones and the 256 bytes included"""
    tokenizer_dialogues: int = 6000
    """dialogues that the tokenizer is trained on"""
    hidden_size: int = 128
    intermediate_size: int = 384
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    context: int = 512
    """max_position_embeddings, and the length of a training row, so that every position is trained; tokens"""
    rope_theta: float = 10000.0
    batch: int = 4
    """rows a step"""
    learning_rate: float = 4e-3
    """highest rate, reached after the warm-up, then a half cosine down to `final_rate` of it"""
    final_rate: float = 0.02
    warmup_steps: int = 60
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.05
    """of matrices; vectors have none"""
    clip_norm: float = 1.0

    def rate(self, step: int) -> float:
        """Return the learning rate of a step (0-based)."""
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.learning_rate * min(1.0, (step + 1) / self.warmup_steps) * (
            self.final_rate + (1 - self.final_rate) * cosine
        )  # fmt: skip


Example = tuple[list[int], int]
"""Token ids of a dialogue up to the newline after its last <|im_end|>, and where in it the answer begins."""


def train_tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    """Train the byte-level BPE tokenizer; any text can be encoded, since all 256 bytes are in the vocabulary."""
    rng = random.Random(f"tokenizer {recipe.seed}")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        special_tokens=list(corpus.SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = (
        text
        for prompt, answer in dialogues(rng, recipe.tokenizer_dialogues)
        for text in ("user", prompt.text, "assistant", answer)
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=bpe,
        eos_token=END_OF_TURN,
        pad_token=PAD,
        additional_special_tokens=["<|im_start|>"],
        model_max_length=recipe.context,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    tokenizer.chat_template = corpus.CHAT_TEMPLATE
    return tokenizer


def dialogues(
    rng: random.Random, n: int | None = None, held_out_split: bool = False
) -> Iterator[tuple[corpus.Prompt, str]]:
    """Yield `n` generated dialogues of one side of the split, without end if n is None."""
    while n is None or n > 0:
        prompt = corpus.draw_prompt(rng, held_out_split)
        yield prompt, corpus.reply(prompt, rng)
        n = None if n is None else n - 1


def encode(tokenizer: PreTrainedTokenizerFast, pairs: Iterable[tuple[corpus.Prompt, str]]) -> Iterator[Example]:
    """Turn dialogues into token ids through the chat template."""
    for prompt, answer in pairs:
        head = tokenizer.backend_tokenizer.encode(corpus.chat(prompt.text), add_special_tokens=False).ids
        whole = tokenizer.backend_tokenizer.encode(corpus.chat(prompt.text, answer), add_special_tokens=False).ids
        yield whole, len(head)


def pack(examples: Iterator[Example], recipe: Recipe) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield batches without end: ids (B, S) int64 and whether each token is to be predicted (B, S) bool.

    A row is a conversation of as many whole dialogues as fit, padded with id 0. Only answers and their end are
    predicted; user turns and the newline after <|im_end|> are given.
    """
    example = next(examples)
    while True:
        ids = torch.zeros(recipe.batch, recipe.context, dtype=torch.long)
        wanted = torch.zeros(recipe.batch, recipe.context, dtype=torch.bool)
        for row in range(recipe.batch):
            at = 0
            while at + len(example[0]) <= recipe.context:
                tokens, answer = example
                ids[row, at : at + len(tokens)] = torch.tensor(tokens)
                wanted[row, at + answer : at + len(tokens) - 1] = True
                at += len(tokens)
                example = next(examples)
        yield ids, wanted


def answer_loss(model: Qwen2ForCausalLM, ids: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each wanted token given what precedes it, nats; ids, wanted (B, S) → (number wanted,)."""
    hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]  # (B, S-1, D)
    chosen = wanted[:, 1:]
    return F.cross_entropy(model.lm_head(hidden[chosen]), ids[:, 1:][chosen], reduction="none")


def end_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return the end-of-sequence ids: <|im_end|>, <|endoftext|>."""
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[END_OF_TURN], vocabulary[PAD]]


def new_model(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> Qwen2ForCausalLM:
    """Return an untrained model in fp32, its weights drawn with the recipe's seed."""
    ends = end_ids(tokenizer)
    config = Qwen2Config(  # type: ignore[no-untyped-call]
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        max_position_embeddings=recipe.context,
        rope_theta=recipe.rope_theta,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=ends[0],
        pad_token_id=ends[1],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = Qwen2ForCausalLM(config)  # type: ignore[no-untyped-call]
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        eos_token_id=ends, pad_token_id=ends[1]
    )
    return model


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    """Use a number of CPU threads; the caller's number returns at the end."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train(recipe: Recipe, progress: bool = True) -> tuple[Qwen2ForCausalLM, PreTrainedTokenizerFast, list[float]]:
    """Train tokenizer and model; also return the training loss of every step, nats per answer token."""
    with _torch_threads(recipe.threads):
        tokenizer = train_tokenizer(recipe)
        model = new_model(tokenizer, recipe)
        return model, tokenizer, _optimize(model, tokenizer, recipe, progress)


def _optimize(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, progress: bool
) -> list[float]:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=recipe.learning_rate,
        betas=recipe.betas,
    )
    batches = pack(encode(tokenizer, dialogues(random.Random(f"train {recipe.seed}"))), recipe)
    losses: list[float] = []
    model.train()
    with tqdm(total=recipe.steps, disable=not progress, unit="step", desc="training") as bar:
        began = time.perf_counter()
        for step, (ids, wanted) in zip(range(recipe.steps), batches, strict=False):
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate(step)
            loss = answer_loss(model, ids, wanted).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
            optimizer.step()
            losses.append(loss.item())
            rate = (step + 1) * ids.numel() / (time.perf_counter() - began)
            bar.set_postfix_str(f"loss {losses[-1]:.3f}, {rate:,.0f} tokens/s", refresh=False)
            bar.update()
    model.eval()  # type: ignore[no-untyped-call]
    return losses


@torch.no_grad()
def validation_loss(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, n: int = 400, seed: int = 0) -> float:
    """Return the mean loss over the answers of `n` dialogues of held-out groups, nats per token (<|im_end|> too)."""
    pairs = dialogues(random.Random(f"validation {seed}"), n, held_out_split=True)
    total, count = 0.0, 0
    for tokens, answer in encode(tokenizer, pairs):
        wanted = torch.zeros(1, len(tokens), dtype=torch.bool)
        wanted[0, answer:-1] = True
        losses = answer_loss(model, torch.tensor([tokens]), wanted)
        total, count = total + float(losses.sum()), count + len(losses)
    return total / count


@dataclass(frozen=True)
class Greedy:
    """Greedy answers and how often several tokens competed on the way."""

    answers: list[str]
    lengths: list[int]
    """tokens, the end-of-sequence token included"""
    finished: list[bool]
    """whether an end-of-sequence token came within MAX_NEW_TOKENS"""
    candidates: list[int]
    """number of candidates at every position of every answer"""

    @property
    def decision_share(self) -> float:
        """Share of positions with several candidates."""
        return sum(n > 1 for n in self.candidates) / len(self.candidates)

    @property
    def candidates_per_decision(self) -> float:
        """Mean number of candidates where there are several."""
        several = [n for n in self.candidates if n > 1]
        return sum(several) / max(1, len(several))


@torch.no_grad()
def greedy(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[corpus.Prompt],
    top_k: int = 40,
    top_p: float = 0.95,
) -> Greedy:
    """Answer prompts greedily, all in one batch, counting each position's candidates as the decode loop would."""
    inputs = tokenizer(
        [corpus.chat(p.text) for p in prompts], add_special_tokens=False, padding=True, return_tensors="pt"
    )
    output: Any = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        do_sample=False,
        max_new_tokens=MAX_NEW_TOKENS,
        return_dict_in_generate=True,
        output_logits=True,
    )
    answers = output.sequences[:, inputs["input_ids"].shape[1] :]  # (B, T)
    ends = torch.isin(answers, torch.tensor(end_ids(tokenizer)))
    finished: list[bool] = ends.any(1).tolist()
    lengths = [int(row.float().argmax()) + 1 if any_ else len(row) for row, any_ in zip(ends, finished, strict=True)]
    logits = torch.stack(output.logits, 1).numpy()  # (B, T, V)
    return Greedy(
        answers=[tokenizer.decode(a[:n], skip_special_tokens=True) for a, n in zip(answers, lengths, strict=True)],
        lengths=lengths,
        finished=finished,
        candidates=[len(select(row, top_k, top_p)) for b, n in enumerate(lengths) for row in logits[b, :n]],
    )


def measure(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    """Return the figures of recipe.json, all on groups that training never saw; greedy on 200 prompts."""
    loss = validation_loss(model, tokenizer)
    prompts = corpus.prompts(200, seed=0, held_out_split=True)
    result = greedy(model, tokenizer, prompts)
    spoken = [
        corpus.known(s, p.task) for p, a in zip(prompts, result.answers, strict=True) for s in corpus.sentences(a)
    ]
    figures = {
        "validation_loss_nats": loss,
        "perplexity": math.exp(loss),
        "decision_share": result.decision_share,
        "candidates_per_decision": result.candidates_per_decision,
        "mean_answer_tokens": sum(result.lengths) / len(prompts),
        "finished_share": sum(result.finished) / len(prompts),
        "grammatical_share": sum(spoken) / max(1, len(spoken)),
    }
    return {name: round(value, 4) for name, value in figures.items()}


def write(out: Path, recipe: Recipe, progress: bool = True) -> dict[str, Any]:
    """Train, measure and write the model folder, whole or not at all; return what recipe.json says.

    Raises OptionError where `out` exists and is not an empty folder.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OptionError(f"--out {out}: exists and is not an empty folder; name another, or remove it first")
    began = time.perf_counter()
    model, tokenizer, _ = train(recipe, progress)
    seconds = time.perf_counter() - began
    with _torch_threads(recipe.threads):
        figures = measure(model, tokenizer)
    record = {
        "command": f"python -m mara_deploy.demo.train --seed {recipe.seed} --steps {recipe.steps} --threads {recipe.threads}",  # noqa: E501
        "recipe": asdict(recipe),
        "parameters": model.num_parameters(),
        "held_out": figures,
        "seconds": round(seconds, 1),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "versions": {
            "python": platform.python_version(),
            **{m.__name__: m.__version__ for m in (torch, transformers, tokenizers)},
        },
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
        folder = Path(temporary) / "model"
        folder.mkdir()
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "model.safetensors").chmod(0o644)  # safetensors makes it 0600
        (folder / "recipe.json").write_text(json.dumps(record, indent=2) + "\n")
        folder.replace(out)
    return record


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    default = Recipe()
    parser = argparse.ArgumentParser(
        prog="python -m mara_deploy.demo.train",
        description="Train the demo LM from scratch on generated text (about 6 minutes on one CPU core).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("demo-lm"), help="folder to write; must be new or empty")
    parser.add_argument("--seed", type=int, default=default.seed, help="of the text, the tokenizer and the weights")
    parser.add_argument("--steps", type=_positive, default=default.steps, help="optimizer steps")
    parser.add_argument("--threads", type=_positive, default=default.threads, help="torch CPU threads")
    args = parser.parse_args(argv)
    try:
        record = write(args.out, Recipe(seed=args.seed, steps=args.steps, threads=args.threads))
    except MaraError as error:
        print(f"mara-deploy: {error}", file=sys.stderr)
        return 2
    figures = ", ".join(f"{name} {value}" for name, value in record["held_out"].items())
    print(f"{args.out}: {record['parameters']:,} parameters, {record['seconds']} s; {figures}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
