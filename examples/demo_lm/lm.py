"""The demo's LM: tokenizer, text as batches, model, training.

The corpus has no end, so every batch is new and there are no epochs.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from examples.demo_lm import corpus
from examples.demo_lm.recipe import Recipe
from mara_deploy.demo.prompts import DemoPrompt

PAD, END_OF_TURN = "<|endoftext|>", "<|im_end|>"

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
) -> Iterator[tuple[DemoPrompt, str]]:
    """Yield `n` generated dialogues of one side of the split, endlessly if n is None."""
    while n is None or n > 0:
        prompt = corpus.draw_prompt(rng, held_out_split)
        yield prompt, corpus.reply(prompt, rng)
        n = None if n is None else n - 1


def encode(tokenizer: PreTrainedTokenizerFast, pairs: Iterable[tuple[DemoPrompt, str]]) -> Iterator[Example]:
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
def torch_threads(threads: int) -> Iterator[None]:
    """Use this many CPU threads, and restore the caller's number at the end."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train(recipe: Recipe, progress: bool = True) -> tuple[Qwen2ForCausalLM, PreTrainedTokenizerFast, list[float]]:
    """Train tokenizer and model; also return the training loss of every step, nats per answer token."""
    with torch_threads(recipe.threads):
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
