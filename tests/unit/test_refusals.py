"""What each command rejects before it loads anything: exit code 2, one line that names what is wrong, nothing written.

BUNDLE in a line stands for the folder of a small bundle without a tokenizer, exported for the CPU: 64 tokens of
context, 8 candidates.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from tests.unit import helpers

RUN, BUILD, EXPORT = "run BUNDLE --input-ids 1,2 ", "build BUNDLE --target tensorrt ", "export --model m --agent a "
EVAL, BENCH = "eval BUNDLE --prompts p --score a:b ", "bench BUNDLE "
TRAIN, RESUME = "train --model demo --prompts demo --score demo --out x ", "train --resume --out x "
WHOLE_1 = "a whole number of at least 1"

TABLE: list[tuple[str, tuple[str, ...]]] = [
    # what is missing or unknown
    ("run", ("BUNDLE",)),
    ("inspect", ("BUNDLE",)),
    ("memory", ("MODEL",)),
    ("bench", ("BUNDLE",)),
    ("build BUNDLE", ("--target",)),
    ("export", ("--model",)),
    ("eval BUNDLE --score a:b", ("--prompts",)),
    ("eval BUNDLE --prompts p", ("--score is missing",)),
    ("train", ("--out",)),
    (RUN + "--nonsense", ("unrecognized arguments: --nonsense",)),
    (EXPORT + "two\nlines", ("unrecognized arguments: two lines",)),
    (EXPORT + "--max-cont 64", ("--max-cont",)),
    ("run nowhere --input-ids 1", ("no bundle found at nowhere",)),
    ("inspect nowhere", ("no bundle found at nowhere",)),
    (BENCH + "--conversations 1,x", ("--conversations is 'x'", "a whole number")),
    (BENCH + "--conversations 0", ("--conversations is 0", WHOLE_1)),
    (BENCH + "--measure steps --conversations 4", ("--conversations needs 'conversations' among --measure",)),
    ("bench nowhere", ("no bundle found at nowhere",)),
    ("build nowhere --target tensorrt", ("no bundle found at nowhere",)),
    ("memory nowhere", ("there is no bundle or model 'nowhere'", "qwen2")),
    # mara-run
    (RUN + "--max-new-tokens 0", ("--max-new-tokens is 0", WHOLE_1)),
    (RUN + "--top-k 0", ("--top-k is 0", WHOLE_1)),
    (RUN + "--top-p 1.5", ("--top-p is 1.5", "from 0 to 1")),
    (RUN + "--top-p nan", ("--top-p is nan",)),
    (RUN + "--threads 0", ("--threads is 0", WHOLE_1)),
    (RUN + "--threads 100000", ("--threads is 100000", "between 1 and")),
    (RUN + "--seed -1", ("--seed is -1", "at least 0")),
    (RUN + "--threshold inf", ("--threshold is inf", "a finite number")),
    (RUN + "--no-align --sample --temperature 0", ("--temperature is 0.0", "above 0")),
    (RUN + "--temperature 0.8", ("--temperature is 0.8", "--sample")),
    (RUN + "--sample", ("--sample", "--no-align")),
    (RUN + "--engine abacus", ("--engine is 'abacus'", "auto, tensorrt, tensorrt-rtx, cuda, cpu")),
    (RUN + "--strategy best", ("--strategy is 'best'", "top1, max_prob, random")),
    (RUN + "--order random", ("--order is 'random'", "ranked, best_last, reversed")),
    (RUN + "--fallback middle", ("--fallback is 'middle'", "first, last")),
    (RUN + "--schedule later", ("--schedule is 'later'", "adaptive, one-by-one, together")),
    (RUN + "--draft 17", ("--draft is 17", "from 0 to 16")),
    (RUN + "--draft 4 --strategy random", ("--draft is 4", "leave it out")),
    (RUN + "--draft 4 --order reversed", ("--draft is 4", "leave it out")),
    (RUN + "--draft 4 --no-align --sample", ("--draft is 4", "leave it out")),
    (RUN + "--agent rude=x", ("--agent is", "'x'", "a finite number")),
    (RUN + "--agent a --agent b --agent a=2", ("--agent gives a name twice: a b a",)),
    (RUN + "--no-align --strategy random", ("--strategy is random", "--no-align")),
    (RUN + "--no-align --order reversed", ("--order is reversed", "--no-align")),
    (RUN + "--no-align --fallback first", ("--fallback is first", "--no-align")),
    (RUN + "--no-align --threshold 1", ("--threshold is 1.0", "--no-align")),
    (RUN + "--explain --no-align", ("--explain", "--no-align runs none")),
    (RUN + "--explain --json", ("--explain is for people", "--json", "--trace")),
    ("run BUNDLE --prompts p.txt --explain", ("--explain is for people", "--prompts")),
    (RUN + "--stop=", ("--stop is empty",)),
    ("run BUNDLE --prompt --hello", ("--prompt has no value", "--prompt=--")),
    ("run BUNDLE --prompt --raw", ("--prompt has no value", "--prompt=--")),
    ("run BUNDLE --prompt -hello --top-k 0", ("--top-k is 0",)),  # it is a prompt
    (RUN + "--threshold -1e-3 --stop -h --top-k 0", ("--stop has no value", "--stop=--")),
    (RUN + "--threshold -1e-3 --stop -1 --top-k 0", ("--top-k is 0",)),
    ("run '' --prompt p", ("BUNDLE is empty",)),
    ("inspect ''", ("BUNDLE|TRACE is empty",)),
    (RUN + "--system S", ("--system needs the chat template", "--input-ids")),
    (RUN + "--template a=1", ("--template needs the chat template", "--input-ids")),
    ("run BUNDLE --prompt p --raw --system S", ("--system needs the chat template", "--raw")),
    ("run BUNDLE --prompt p --raw --prefill P", ("--prefill needs the chat template", "--raw")),
    (RUN + "--prefill P", ("--prefill needs the chat template", "--input-ids")),
    (RUN + "--prefill=", ("--prefill is empty",)),
    ("run BUNDLE --prompt p --raw --template a=1", ("--template needs the chat template", "--raw")),
    ("run BUNDLE --prompt p --template loud=yes", ("--template is 'loud=yes'", "KEY=JSON")),
    ("run BUNDLE --prompt p --template =1", ("--template is '=1'", "KEY=JSON")),
    (RUN + "--prompt p", ("--prompt and --input-ids",)),
    (RUN + "--prompts p", ("--prompts and --input-ids are both given",)),
    ("run BUNDLE --prompts p --prompt q", ("--prompts and --prompt are both given",)),
    ("run BUNDLE --prompts p --trace t", ("--prompts and --trace are both given",)),
    ("run BUNDLE --prompts p --json", ("--json is for one answer", "--jsonl")),
    ("run BUNDLE --prompts p --conversations 0", ("--conversations is 0", WHOLE_1)),
    ("run BUNDLE --prompts p --raw --system S", ("--system needs the chat template", "--raw")),
    ("run BUNDLE --prompts p.csv", ("p.csv", "'.csv'", ".jsonl")),
    ("run BUNDLE --prompts nowhere.txt", ("nowhere.txt cannot be read: No such file",)),
    ("run BUNDLE --prompts=", ("--prompts is empty",)),
    (RUN + "--jsonl", ("--jsonl is given, but no --prompts",)),
    (RUN + "--conversations 4", ("--conversations is given, but no --prompts",)),
    ("run BUNDLE --input-ids 1,x", ("--input-ids is 'x'", "a whole number")),
    ("run BUNDLE --input-ids 1,,2", ("--input-ids is empty",)),
    ("run BUNDLE --input-ids=", ("--input-ids is empty",)),
    # mara-agent
    ("agent", ("COMMAND",)),
    ("agent change BUNDLE", ("'change'", "add", "remove", "list")),
    ("agent add BUNDLE", ("FILE",)),
    ("agent remove BUNDLE", ("NAME",)),
    ("agent list nowhere", ("no bundle found at nowhere",)),
    ("agent add nowhere a.pth", ("no bundle found at nowhere",)),
    ("agent add BUNDLE ''", ("FILE is empty",)),
    ("agent add BUNDLE a.pth --name=", ("--name is empty",)),
    ("agent remove BUNDLE nobody", ("NAME is 'nobody'", "the bundle has agent")),
    ("agent list BUNDLE --debu", ("unrecognized arguments: --debu",)),
    # mara-sign
    ("sign", ("BUNDLE and --key, or --new-key",)),
    ("sign BUNDLE", ("BUNDLE and --key, or --new-key",)),
    ("sign BUNDLE --new-key k", ("leave out BUNDLE and --key",)),
    ("sign BUNDLE --key=", ("--key is empty",)),
    (RUN + "--require-signature k --no-verify", ("--require-signature", "leave out --no-verify")),
    # mara-export
    (EXPORT + "--max-context 1", ("--max-context is 1", "at least 2")),
    (EXPORT + "--max-candidates 1025", ("--max-candidates is 1025", "from 1 to 1024")),
    (EXPORT + "--target abacus", ("--target is 'abacus'", "cpu, cuda, tensorrt, tensorrt-rtx")),
    (EXPORT + "--precision fp8", ("--precision is 'fp8'", "fp32, fp16, bf16, int8, int4")),
    (EXPORT + "--target cpu --target cuda --precision fp32", ("--precision is 'fp32'", "--target cuda", "fp16")),
    (EXPORT + "--target cuda --lowering portable", ("--lowering is 'portable'", "--target cuda supports ort")),
    (EXPORT + "--target tensorrt --lowering ort", ("--lowering is 'ort'", "--target tensorrt supports portable")),
    (EXPORT + "--lowering none", ("--lowering is 'none'", "ort, portable, decomposed")),
    (EXPORT + "--precision bf16", ("--precision is 'bf16'", "--target cpu supports")),
    (EXPORT + "--target tensorrt --precision bf16", ("--precision is 'bf16'", "--no-gate")),
    (EXPORT + "--block-size 32", ("--block-size", "int8 and int4")),
    (EXPORT + "--quantiser rtn", ("--quantiser", "int8 and int4")),
    (EXPORT + "--keep x", ("--keep", "int8 and int4")),
    (EXPORT + "--precision int4 --keep=", ("--keep is empty",)),
    (EXPORT + "--precision int4 --block-size 33", ("--block-size is 33", "16 or 32 or 64 or 128 or 256")),
    (EXPORT + "--target tensorrt --precision int8 --block-size 64", ("--block-size is 64", "one scale per column")),
    (EXPORT + "--target tensorrt --precision int4 --block-size 32", ("--block-size is 32", "64 or 128")),
    (EXPORT + "--precision int8 --quantiser hqq", ("--quantiser is 'hqq'", "int4")),
    (EXPORT + "--precision int8 --quantiser best", ("--quantiser is 'best'", "rtn, hqq, k-quant")),
    (EXPORT + "--precision int4 --quantiser k-quant --block-size 64", ("--block-size is 64", "k-quant", "32")),
    (EXPORT + "--precision int4 --quantiser hqq --lowering portable", ("--quantiser is 'hqq'", "supports rtn")),
    (EXPORT + "--target cuda --precision int4 --quantiser hqq", ("--quantiser is 'hqq'", "--target cuda supports rtn")),
    (EXPORT + "--no-build --target cuda", ("--no-build", "tensorrt and tensorrt-rtx")),
    (EXPORT + "--out=", ("--out is empty",)),
    ("export --model= --agent a", ("--model is empty",)),
    ("export --model m --agent=", ("--agent is empty",)),
    # mara-build
    ("build BUNDLE --target cpu", ("--target is 'cpu'", "tensorrt, tensorrt-rtx")),
    (BUILD + "--capacity many", ("--capacity is 'many'", WHOLE_1)),
    (BUILD + "--capacity=", ("--capacity is empty",)),
    (BUILD + "--capacity 0 --capacity 64", ("--capacity is 0", WHOLE_1)),
    (BUILD + "--workspace 0", ("--workspace is 0", "from 1")),
    (BUILD + "--hardware all", ("--hardware is 'all'", "none, ampere-plus, same-compute-capability")),
    (BUILD + "--optimisation-level 9", ("--optimisation-level is 9", "from 0 to 5")),
    (BUILD + "--timing-cache=", ("--timing-cache is empty",)),
    # mara-memory
    ("memory qwen2 --target tpu", ("--target is 'tpu'", "cpu, cuda, tensorrt, tensorrt-rtx")),
    ("memory qwen2 --target cuda --precision fp32", ("--precision is 'fp32'", "fp16, int8, int4")),
    ("memory qwen2 --precision=", ("--precision is ''", "fp32, fp16")),
    ("memory qwen2 --lowering ort", ("--lowering is 'ort'", "portable or decomposed")),
    ("memory qwen2 --context 2048 --context 1", ("--context is 1", "at least 2")),
    ("memory llama3 --context 8193", ("--context is 8193", "8192")),
    ("memory demo --context 100000", ("--context is 100000", "512")),
    ("memory qwen2 --max-candidates 0", ("--max-candidates is 0", "from 1 to 1024")),
    ("memory qwen2 --block-size 64", ("--block-size is 64", "--precision int8 or int4")),
    ("memory qwen2 --block-size 0 --precision int4", ("--block-size is 0", "64 or 128")),
    ("memory qwen2 --block-size 64 --precision int8", ("--block-size is 64", "one scale per column")),
    ("memory qwen2 --block-size 64 --precision fp16", ("--block-size", "int8 and int4")),
    ("memory BUNDLE --precision int4", ("--precision is int4", "leave it out")),
    ("memory BUNDLE --lowering ort", ("--lowering is ort", "leave it out")),
    ("memory BUNDLE --block-size 32", ("--block-size is 32", "leave it out")),
    ("memory BUNDLE --max-candidates 8", ("--max-candidates is 8", "leave it out")),
    ("memory BUNDLE --target cuda", ("--target is 'cuda'", "cpu")),
    ("memory BUNDLE --context 65", ("--context is 65", "64 tokens")),
    # mara-serve
    ("serve", ("BUNDLE",)),
    ("serve BUNDLE --port 70000", ("--port is 70000", "from 0 to 65535")),
    ("serve BUNDLE --queue -1", ("--queue is -1", "at least 0")),
    ("serve BUNDLE --timeout 0", ("--timeout is 0", "above 0")),
    ("serve BUNDLE BUNDLE", ("two bundles have the name",)),
    ("serve BUNDLE --api-keys nowhere", ("--api-keys", "nowhere")),
    # mara-eval
    (EVAL + "--limit 0", ("--limit is 0", WHOLE_1)),
    (EVAL + "--examples -1", ("--examples is -1", "at least 0")),
    (EVAL + "--out=", ("--out is empty",)),
    (EVAL + "--training-prompts=", ("--training-prompts is empty",)),
    (EVAL + "--sample-checkpoint", ("--sample-checkpoint", "leave it out")),
    (EVAL + "--sample-checkpoint --baseline greedy --baseline sample", ("--sample-checkpoint", "leave it out")),
    (EVAL + "--ignore-weights v*", ("--ignore-weights", "leave it out")),
    (EVAL + "--temperature 0.5", ("--temperature is 0.5", "leave it out")),
    (EVAL + "--baseline best-of-1", ("--baseline is best-of-1", "at least 2")),
    (EVAL + "--template a=1 --raw", ("--template needs the chat template", "--raw")),
    (EVAL + "--no-align", ("unrecognized arguments: --no-align",)),
    (EVAL + "--score-batch 0", ("--score-batch is 0", WHOLE_1)),
    (EVAL + "--score-device cpu", ("--score-device is cpu", "leave it out")),
    (EVAL + "--weight nan", ("--weight", "nan")),
    ("eval BUNDLE --prompts p --weight 2", ("--weight must follow the --score",)),
    # mara-bench
    (BENCH + "--rounds 0", ("--rounds is 0", WHOLE_1)),
    (BENCH + "--tokens 1", ("--tokens is 1", "at least 2")),
    (BENCH + "--tokens 64", ("--tokens is 64", "64 tokens")),
    (BENCH + "--tokens 8 --context 56", ("--context is 56", "1 to 55")),
    (BENCH + "--measure steps --profile 2", ("--profile", "--measure")),
    (BENCH + "--measure steps,speed", ("--measure is 'speed'", "memory, steps, prefill, width, profiles")),
    (BENCH + "--profile 9", ("--profile is 9", "1, 2, 3, 4, 5")),
    (BENCH + "--tokens 8 --peer llama", ("--peer is 'llama'", "NAME=COMMAND")),
    (BENCH + "--tokens 8 --peer a='", ("--peer is \"a='\"", "NAME=COMMAND")),
    (BENCH + "--tokens 8 --peer mara=x", ("--peer is 'mara=x'", "mara is already in use")),
    (BENCH + "--tokens 8 --peer a=x --peer a=y", ("--peer is 'a=y'", "a is already in use")),
    # mara-train
    ("train --prompts demo --score demo --out x", ("--model is missing",)),
    ("train --model demo --score demo --out x", ("--prompts is missing",)),
    ("train --model demo --prompts demo --out x", ("--score is missing",)),
    ("train --model demo --prompts demo --score demo --out=", ("--out is empty",)),
    ("train --out x --weight 2", ("--weight must follow the --score",)),
    (TRAIN + "--weight 0", ("--weight of demo is 0.0", "other than 0")),
    (TRAIN + "--weight 1 --weight 2", ("--weight is given twice",)),
    (TRAIN + "--score-batch 0", ("--score-batch is 0", WHOLE_1)),
    (TRAIN + "--score-batch 8", ("--score-batch is 8", "leave it out")),
    (TRAIN + "--score-device cpu", ("--score-device is cpu", "leave it out")),
    (TRAIN + "--dtype int8", ("--dtype is 'int8'", "float32, bfloat16, float16")),
    (TRAIN + "--recipe cheap", ("--recipe is 'cheap'", "paper, demo")),
    (TRAIN + "--episodes 0", ("--episodes is 0", WHOLE_1)),
    (TRAIN + "--top-k 1", ("--top-k is 1", "a whole number of at least 2")),
    (TRAIN + "--top-p 0", ("--top-p is 0.0", "above 0", "at most 1")),
    (TRAIN + "--widths 4 0", ("--widths is 0", WHOLE_1)),
    (TRAIN + "--fallback best", ("--fallback is 'best'", "first, last")),
    (TRAIN + "--kl-weight -0.1", ("--kl-weight is -0.1", "at least 0")),
    (TRAIN + "--score-baseline inf", ("--score-baseline is inf", "finite")),
    (TRAIN + "--discount 1.5", ("--discount is 1.5", "at most 1")),
    (TRAIN + "--n-step 0", ("--n-step is 0", WHOLE_1)),
    (TRAIN + "--target-entropy 2", ("--target-entropy is 2.0", "from 0 to 0.98")),
    (TRAIN + "--batch 0", ("--batch is 0", WHOLE_1)),
    (TRAIN + "--updates-per-episode 0", ("--updates-per-episode is 0.0", "above 0")),
    (TRAIN + "--start-transitions 0", ("--start-transitions is 0", WHOLE_1)),
    (
        TRAIN + "--replay-transitions 10 --start-transitions 11",
        ("--replay-transitions is 10", "--start-transitions, 11"),
    ),
    (TRAIN + "--learning-rate inf", ("--learning-rate is inf", "above 0")),
    (TRAIN + "--clip-norm -1", ("--clip-norm is -1.0", "above 0")),
    (TRAIN + "--target-rate 0", ("--target-rate is 0.0", "at most 1")),
    (TRAIN + "--alpha-rate -1", ("--alpha-rate is -1.0", "at least 0")),
    (TRAIN + "--alpha-form sqrt", ("--alpha-form is 'sqrt'", "log, direct")),
    (TRAIN + "--seed -1", ("--seed is -1", f"from 0 to {2**63 - 1}")),
    (TRAIN + "--checkpoint-minutes -1", ("--checkpoint-minutes is -1.0", "at least 0")),
    (TRAIN + "--target-entropy 1", ("--target-entropy is 1.0", "from 0 to 0.98")),
    (RESUME + "--n-step 3 --device cpu --seed 0", ("--resume", "--episodes", "leave out --n-step, --seed", "--init-")),
    *((RESUME + given, ("--resume", f"leave out {given.split()[0]}")) for given in (
        "--prompts p", "--recipe demo", "--template a=1", "--init-agent a", "--top-k 3", "--widths 8 8",
    )),
    *((RESUME + given, ("there is no run.json",)) for given in (
        "--model demo", "--score a:b", "--device cpu", "--dtype float32", "--score-device cpu", "--score-batch 8",
        "--threads 2", "--prompts-at-once 4", "--max-new-tokens 4", "--replay-transitions 9", "--checkpoint-minutes 1",
    )),
]  # fmt: skip


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return helpers.make_bundle(tmp_path_factory.mktemp("refusals") / "bundle", max_context=64, max_candidates=8)


@pytest.mark.parametrize(("line", "named"), TABLE, ids=[line for line, _ in TABLE])
def test_a_refusal_is_one_line_that_names_what_is_wrong(
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    line: str,
    named: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(bundle.rglob("*"))
    name, *argv = line.split(" ")
    try:
        code = importlib.import_module(f"mara_deploy.commands.{name}").main(
            [{"BUNDLE": str(bundle), "''": ""}.get(word, word) for word in argv if word]
        )
    except SystemExit as exit_:  # argparse
        code = exit_.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    *progress, last = err.splitlines()
    assert last.startswith(f"mara-{name}: error: ")
    assert all(text.startswith(("engine ", "agent ")) for text in progress), err
    assert all(text in last for text in named), last
    assert not any(tmp_path.iterdir())
    assert sorted(bundle.rglob("*")) == before


def test_a_wrong_value_of_a_models_configuration_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mara_deploy.commands.memory import main

    sizes = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    config = {**sizes, "vocab_size": 512, "intermediate_size": 96, "max_position_embeddings": 64}
    for text, named in (
        ("{", "is not JSON"),
        ("[]", "is not a Hugging Face configuration"),
        (json.dumps({**config, "model_type": 7}), "model_type = 7"),
        (json.dumps({**config, "text_config": {}}), "more than text"),
        (json.dumps({**config, "hidden_size": None}), "hidden_size = None"),
        (json.dumps({**config, "vocab_size": 0}), "vocab_size = 0"),
        (json.dumps({**config, "num_hidden_layers": "16"}), "num_hidden_layers = '16'"),
        *((json.dumps({**config, "max_position_embeddings": size}), "max_position") for size in (0, "many", [1], {})),
    ):
        (tmp_path / "config.json").write_text(text, encoding="utf-8")
        assert main([str(tmp_path)]) == 2
        assert named in capsys.readouterr().err
