"""`mara-eval` on real bundles: what it compares, that it goes on where it stopped, and one line for what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from transformers.utils import logging

from mara_deploy.commands.scoring import ScoreOption, judges
from mara_deploy.demo import MODEL_FOLDER, corpus
from mara_deploy.evaluate.answers import Asking, BundleAnswers
from mara_deploy.evaluate.checkpoint import CheckpointAnswers
from mara_deploy.files import held
from mara_deploy.scores import base as scores
from mara_deploy.scores.base import FunctionScore
from mara_runtime.config import DecodeConfig
from mara_runtime.decoder import AlignedDecoder
from mara_runtime.errors import MaraError
from tests import checkpoints

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = corpus.prompts(6, seed=5, held_out_split=True)
LIMITS = ("--max-new-tokens", "24", "--threads", "1")
SCORE = ("--score", "scores_of_the_test:words")


@pytest.fixture(scope="module", autouse=True)
def score_module(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("scores")
    (folder / "scores_of_the_test.py").write_text(
        "def words(prompts, answers):\n    return [len(set(answer.split())) for answer in answers]\n\n\n"
        "def bad(prompts, answers):\n    return [float('inf')] * len(answers)\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield folder


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.json"
    entries = [{"instruction": p.text, "topic": p.group[0]} for p in (*PROMPTS, PROMPTS[2])]
    path.write_text(json.dumps(entries))
    return path


@pytest.fixture(scope="module")
def decoder(bundle) -> AlignedDecoder:
    return AlignedDecoder(bundle("demo"), threads=1)


def read(out: Path) -> dict[str, Any]:
    return json.loads((out / "result.json").read_text(encoding="utf-8"))


def without_times(value: Any) -> Any:
    """A result but for how long it took and where it was written."""
    if isinstance(value, dict):
        timed = ("prefill_ms", "decode_ms", "engine_ms", "tokens_per_second", "command")
        return {key: without_times(one) for key, one in value.items() if key not in timed}
    return value


def test_baselines_side_by_side(bundle, prompt_file, tmp_path, command):
    training = tmp_path / "training.txt"
    training.write_text(f"{PROMPTS[4].text}\nAnother one?\n")
    out = tmp_path / "out"
    outcome = command(
        "eval", bundle("demo"), "--prompts", prompt_file, "--group-by", "topic", "--training-prompts", training, *SCORE,
        "--baseline", "greedy", "--baseline", "sample", "--baseline", "best-of-3", "--out", out, *LIMITS,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    found = read(out)
    assert found["prompts"] == {
        "file": "prompts.json", "read": 7, "duplicates": 1, "refused": 0, "limit": None, "unique": 6,
        "training_file": "training.txt",
    }  # fmt: skip
    assert found["in_training"] == [PROMPTS[4].text]
    assert found["bootstrap"]["unit"] == "group"
    assert found["bootstrap"]["units"] == len({p.group[0] for p in PROMPTS})
    assert list(found["comparisons"]) == ["greedy", "sample", "best-of-3"]
    for comparison in found["comparisons"].values():
        one = comparison["combined"]
        assert one["wins"] + one["ties"] + one["losses"] == 6
        assert one["rate"] == pytest.approx((one["wins"] - one["losses"]) / 6)
    # the best of three by the score is at least as good as the first of them, which is the sampled answer
    means = {name: comparison["combined"]["baseline_mean"] for name, comparison in found["comparisons"].items()}
    assert means["best-of-3"] > means["sample"]
    assert found["sides"]["aligned"]["counters"]["decisions"] > 0
    assert found["sides"]["greedy"]["counters"]["decisions"] == 0
    sampled = found["sides"]["best-of-3"]["counters"]["tokens"]
    assert sampled > found["sides"]["sample"]["counters"]["tokens"] * 2
    page = (out / "report.html").read_text(encoding="utf-8")
    assert PROMPTS[0].text in page
    assert "aligned against greedy:" in outcome.out
    assert str(out / "report.html") in outcome.out


def test_greedy_of_the_bundle_and_of_its_own_checkpoint_tie_on_every_prompt(bundle, prompt_file, tmp_path, command):
    out = tmp_path / "out"
    outcome = command(
        "eval", bundle("demo"), "--prompts", prompt_file, *SCORE, "--baseline", MODEL_FOLDER, "--baseline", "greedy",
        "--out", out, *LIMITS,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    found = read(out)
    name = MODEL_FOLDER.name
    assert found["comparisons"][name] == found["comparisons"]["greedy"]
    lines = {n: (out / "answers" / f"{n}.jsonl").read_text().splitlines()[1:] for n in (name, "greedy")}
    texts = {
        n: [[a["text"], a["tokens"], a["finish_reason"]] for line in some for a in json.loads(line)["record"]]
        for n, some in lines.items()
    }
    assert texts[name] == texts["greedy"]
    assert found["sides"][name]["counters"] is None


def test_an_interrupted_run_goes_on_to_the_same_result(bundle, prompt_file, tmp_path, command, monkeypatch):
    def run(out: Path) -> Any:
        return command(
            "eval", bundle("demo"), "--prompts", prompt_file, *SCORE, "--baseline", "sample", "--strategy", "random",
            "--out", out, *LIMITS,
        )  # fmt: skip

    assert run(tmp_path / "whole").code == 0
    generate, left = AlignedDecoder.generate, 4

    def interrupted(self, *arguments, **options):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return generate(self, *arguments, **options)

    for once in (4, 6):  # amid the aligned answers, then amid the sampled ones
        left = once
        monkeypatch.setattr(AlignedDecoder, "generate", interrupted)
        outcome = run(tmp_path / "cut")
        assert outcome.code == 2
        assert outcome.err.splitlines()[-1] == "mara-eval: error: interrupted"
        assert not (tmp_path / "cut" / "result.json").exists()
        monkeypatch.undo()
    outcome = run(tmp_path / "cut")
    assert outcome.code == 0, outcome.err
    assert "sample: 2 to answer, 4 kept" in outcome.err
    assert without_times(read(tmp_path / "cut")) == without_times(read(tmp_path / "whole"))


@pytest.mark.parametrize("changed", [("--seed", "1"), ("--max-new-tokens", "9"), ("--top-k", "5"), ("--raw",)])
def test_a_changed_setting_is_refused(bundle, prompt_file, tmp_path, command, changed):
    arguments = ("eval", bundle("demo"), "--prompts", prompt_file, *SCORE, "--out", tmp_path / "out", *LIMITS)
    assert command(*arguments, "--limit", 1, "--quiet").code == 0
    before = read(tmp_path / "out")
    outcome = command(*arguments, "--limit", 1, *changed)
    assert (outcome.code, outcome.out) == (2, "")
    setting = changed[0].removeprefix("--").replace("-", "_")
    assert f"aligned.jsonl was made with {setting} " in outcome.err.splitlines()[-1]
    assert read(tmp_path / "out") == before


def test_an_answer_does_not_depend_on_those_before_it(decoder):
    config, asking = DecodeConfig(max_new_tokens=24), Asking()
    prompts = [p.text for p in PROMPTS[:3]]
    aligned = BundleAnswers("aligned", decoder, config, asking)
    sampled = BundleAnswers("sample", decoder, DecodeConfig(max_new_tokens=24, align=False, sample=True), asking)
    for contestant in (aligned, sampled):
        there = {prompt: contestant(prompt) for prompt in prompts}
        back = {prompt: contestant(prompt) for prompt in prompts[::-1]}
        for prompt in prompts:
            (a,), (b,) = there[prompt], back[prompt]
            assert (a.text, a.tokens) == (b.text, b.tokens)
            assert without_times(a.stats) == without_times(b.stats)
    assert len({sampled(prompt)[0].text for prompt in prompts}) == 3
    several = BundleAnswers("best-of-3", decoder, DecodeConfig(max_new_tokens=24, align=False, sample=True), asking, 3)
    assert len({answer.text for answer in several(prompts[0])}) > 1


# ── other checkpoints ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_checkpoint_decodes_as_a_bundle_does_whatever_its_generation_config_wants(checkpoint, tmp_path, bundle):
    """Penalties and sampling of the checkpoint's own generation config are left aside; its list of EOS ids is not."""
    folder = tmp_path / "tuned"
    shutil.copytree(checkpoint("qwen2"), folder)
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == list(checkpoints.EOS_IDS)
    (folder / "generation_config.json").write_text(
        json.dumps({**generation, "repetition_penalty": 5.0, "do_sample": True, "temperature": 9.0, "top_k": 3})
    )
    plain = DecodeConfig(max_new_tokens=40, align=False)
    decoder = AlignedDecoder(bundle("qwen2"), threads=1)
    theirs, ours = CheckpointAnswers(str(folder), plain, Asking()), BundleAnswers("greedy", decoder, plain, Asking())
    prompts = [f"Tell me about number {i}." for i in range(24)]
    ends = {decoder.generate(prompt, plain).token_ids[-1] for prompt in prompts}
    assert ends > set(checkpoints.EOS_IDS)  # each of the two ids ends an answer, and some are cut off
    pairs = [(theirs(prompt)[0], ours(prompt)[0]) for prompt in prompts]
    assert [(a.text, a.tokens, a.finish_reason) for a, _ in pairs] == [
        (b.text, b.tokens, b.finish_reason) for _, b in pairs
    ]


def test_a_checkpoint_samples_within_the_candidates_and_repeats_itself(checkpoint):
    asking = Asking(raw=True)
    best = CheckpointAnswers(str(checkpoint("llama")), DecodeConfig(max_new_tokens=12, align=False), asking)
    narrow = CheckpointAnswers(
        str(checkpoint("llama")),
        DecodeConfig(max_new_tokens=12, align=False, sample=True, top_k=1, temperature=3.0),
        asking,
    )
    wide_config = DecodeConfig(max_new_tokens=12, align=False, sample=True, top_p=1.0, temperature=3.0)
    wide = CheckpointAnswers(str(checkpoint("llama")), wide_config, asking)
    prompts = ["One", "Two", "Three"]
    assert [narrow(p) for p in prompts] == [best(p) for p in prompts]
    state = torch.get_rng_state()
    first = [wide(p) for p in prompts]
    assert torch.equal(torch.get_rng_state(), state)
    assert first == [wide(p) for p in prompts]
    assert first != [best(p) for p in prompts]
    wide.close()
    assert first[0] == wide(prompts[0])


def test_stop_texts_and_the_context_end_a_checkpoints_answer(checkpoint):
    folder = str(checkpoint("mistral"))
    (whole,) = CheckpointAnswers(folder, DecodeConfig(max_new_tokens=30, align=False), Asking())("One")
    stop = whole.text[4:6]
    config = DecodeConfig(max_new_tokens=30, align=False, stop=(stop,))
    (cut,) = CheckpointAnswers(folder, config, Asking())("One")
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"
    long = CheckpointAnswers(folder, DecodeConfig(max_new_tokens=10_000, align=False), Asking(raw=True))
    (most,) = long("a b c d e f g h " * 30)
    assert most.tokens < 512
    with pytest.raises(MaraError, match=r"the prompt has \d+ tokens; mistral holds 512"):
        long.check("a b c d e f g h " * 60)


def test_settings_of_a_checkpoint_tell_its_weights_and_its_options(checkpoint, tmp_path):
    folder = tmp_path / "qwen2"
    shutil.copytree(checkpoint("qwen2"), folder)
    greedy, sampled = DecodeConfig(align=False), DecodeConfig(align=False, sample=True, seed=3)
    first = CheckpointAnswers(str(folder), greedy, Asking()).settings
    assert first == CheckpointAnswers(str(checkpoint("qwen2")), greedy, Asking()).settings
    assert CheckpointAnswers(str(folder), sampled, Asking()).settings["seed"] == 3
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    assert CheckpointAnswers(str(folder), greedy, Asking()).settings["files"] != first["files"]


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((), "there is no --score"),
        (("--score", "scores_of_the_test:none"), "has no function 'none'"),
        (("--weight", "2", *SCORE), "--weight belongs after the --score that it applies to"),
        ((*SCORE, "--weight", "1", "--weight", "2"), "--weight is given twice for the score scores_of_the_test:words"),
        ((*SCORE, "--weight", "0"), "--weight of scores_of_the_test:words is 0.0; it must be a finite number other"),
        ((*SCORE, "--weight", "nan"), "it must be a finite number other than 0"),
        ((*SCORE, "--score-template", "{prompt}{answer}"), "is a Python function"),
        ((*SCORE, "--score-batch", "0"), "--score-batch is 0; it must be at least 1"),
        (("--score", "scores_of_the_test:bad"), "the score scores_of_the_test:bad is inf for the answer to the prompt"),
        ((*SCORE, "--baseline", "best-of-1"), "best-of-N needs an N of at least 2"),
        (
            (*SCORE, "--baseline", "gredy"),
            "--baseline is 'gredy', which is not greedy, sample or best-of-N: there is no",
        ),
        ((*SCORE, "--baseline", "greedy", "--baseline", "greedy"), "two --baseline have the name greedy"),
        ((*SCORE, "--limit", "0"), "--limit is 0; it must be at least 1"),
        ((*SCORE, "--examples", "-1"), "--examples is -1; it must be at least 0"),
        ((*SCORE, "--temperature", "0"), "--temperature is 0.0"),
        ((*SCORE, "--temperature", "0", "--baseline", "sample"), "--temperature is 0.0; it must be"),
        ((*SCORE, "--temperature", "1"), "--temperature is 1.0, but no --baseline samples: leave it out"),
        (
            (*SCORE, "--temperature", "1", "--baseline", str(MODEL_FOLDER)),
            "--temperature is 1.0, but no --baseline samples: leave it out",
        ),
        (
            (*SCORE, "--sample-checkpoint", "--baseline", "sample", "--baseline", "best-of-2", "--baseline", "greedy"),
            "--sample-checkpoint is given, but no --baseline is a checkpoint: leave it out",
        ),
        ((*SCORE, "--score-device", "cpu"), "--score-device is cpu, but no --score is a model: leave it out"),
        ((*SCORE, "--score-batch", "8"), "--score-batch is 8, but no --score is a model: leave it out"),
        ((*SCORE, "--template", "x"), "it must be KEY=JSON"),
        (
            (*SCORE, "--template", "tokenize=false", "--baseline", str(MODEL_FOLDER)),
            "the chat template's variable 'tokenize' is set by the code itself: leave it out",
        ),
        ((*SCORE, "--template", "x=1", "--raw"), "--template needs the chat template"),
        ((*SCORE, "--group-by", "nothing"), "entry 1 has no 'nothing' to group by; it has 'instruction', 'topic'"),
        ((*SCORE, "--training-prompts", "none.txt"), "the prompt file none.txt cannot be read: No such file"),
        ((*SCORE, "--training-prompts", ""), "the prompt file . cannot be read"),
        (
            (*SCORE, "--prompts", "demo-final", "--group-by", "group"),
            "--group-by is 'group', but demo-final has groups of its own: leave it out",
        ),
        ((*SCORE, "--out", ""), "--out is empty; leave it out for the default"),
    ],
)
def test_bad_input_is_one_line(bundle, prompt_file, tmp_path, command, arguments, line):
    out = tmp_path / "out"
    outcome = command("eval", bundle("demo"), "--prompts", prompt_file, "--out", out, *LIMITS, "--quiet", *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert line in outcome.err
    assert len(outcome.err.splitlines()) == 1
    assert not (out / "result.json").exists()


def test_quiet_is_quiet_with_checkpoints_in_several_files_too(bundle, prompt_file, tmp_path, command):
    """For which transformers draws progress bars."""
    logging.enable_progress_bar()
    judge = LlamaForSequenceClassification(LlamaConfig.from_pretrained(MODEL_FOLDER, num_labels=1))
    for model, name in ((LlamaForCausalLM.from_pretrained(MODEL_FOLDER), "other"), (judge, "judge")):
        model.save_pretrained(tmp_path / name, max_shard_size="500KB")
        assert (tmp_path / name / "model.safetensors.index.json").is_file()
        for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            shutil.copy(MODEL_FOLDER / file, tmp_path / name)
    where = ("--prompts", prompt_file, "--limit", "1", "--out", tmp_path / "out", *LIMITS, "--quiet")
    for options in (
        ("--score", tmp_path / "judge"),
        (*SCORE, "--baseline", tmp_path / "other", "--out", tmp_path / "2"),
    ):
        logging.enable_progress_bar()
        outcome = command("eval", bundle("demo"), *where, *options)
        assert (outcome.code, outcome.out, outcome.err) == (0, "", "")


def test_a_folder_of_something_else_is_left_alone(bundle, prompt_file, tmp_path, command):
    out = tmp_path / "mine"
    out.mkdir()
    (out / "letter.txt").write_text("Dear")
    outcome = command("eval", bundle("demo"), "--prompts", prompt_file, *SCORE, "--out", out)
    assert outcome.code == 2
    assert "exists already and is not an evaluation: choose another --out" in outcome.err
    assert [path.name for path in out.iterdir()] == ["letter.txt"]


def test_a_folder_that_another_run_is_using_is_left_alone(bundle, prompt_file, tmp_path, command):
    out = tmp_path / "out"
    arguments = ("eval", bundle("demo"), "--prompts", prompt_file, *SCORE, "--limit", 1, "--out", out, *LIMITS)
    with held(out):
        outcome = command(*arguments, "--quiet")
        assert (outcome.code, outcome.out) == (2, "")
        assert outcome.err == (
            f"mara-eval: error: another run is using {out}: wait until it ends, or choose another --out\n"
        )
        assert list(out.iterdir()) == []
    assert command(*arguments, "--quiet").code == 0
    assert sorted(path.name for path in out.iterdir()) == ["answers", "report.html", "result.json", "scores"]


def test_scores_of_a_model_are_known_by_where_it_ran(monkeypatch):
    """A GPU computes in another precision; the values of a function do not depend on it."""
    monkeypatch.setattr(scores, "load_score", lambda spec, **_: FunctionScore(spec, len, "the same"))
    options = [ScoreOption("demo"), ScoreOption("someone/reward")]
    kept = [[judge.settings for judge in judges(options, device, None)] for device in (None, "cpu", "cuda:1")]
    assert [of[0] for of in kept] == [{"template": None, "code or weights": "the same"}] * 3
    assert [of[1]["device"] for of in kept] == ["cpu", "cpu", "cuda"]


def test_prompts_that_the_bundle_refuses(bundle, tmp_path, command):
    path = tmp_path / "prompts.txt"
    path.write_text(f"{PROMPTS[0].text}\n{'very ' * 300}long\n")
    arguments = ("eval", bundle("demo"), "--prompts", path, *SCORE, "--out", tmp_path / "out", *LIMITS, "--quiet")
    outcome = command(*arguments)
    assert outcome.code == 2
    assert "prompt 2: the prompt has" in outcome.err
    assert "--skip-refused" in outcome.err
    assert not (tmp_path / "out").exists()
    assert command(*arguments, "--skip-refused").code == 0
    assert read(tmp_path / "out")["prompts"]["refused"] == 1


def test_the_demos_prompt_sets(bundle, tmp_path, command):
    arguments = ("--score", "demo", "--limit", "3", "--out", tmp_path / "out", *LIMITS, "--quiet")
    sets = ("--prompts", "demo-final", "--training-prompts", "demo")
    assert command("eval", bundle("demo"), *sets, *arguments).code == 0
    found = read(tmp_path / "out")
    assert found["prompts"]["file"] == "demo-final"
    assert found["prompts"]["unique"] == 3
    assert found["in_training"] == []
    assert found["bootstrap"]["unit"] == "group"


def test_without_pytorch_and_what_comes_with_it(bundle, prompt_file, tmp_path, score_module):
    """A device that decodes can evaluate too, by a score in Python."""
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'onnx', 'optimum', 'safetensors', 'mara_export'):\n"
        "    sys.modules[name] = None\n"
        "from mara_deploy.commands.eval import main\nsys.exit(main(sys.argv[1:]))"
    )
    arguments = [bundle("demo"), "--prompts", prompt_file, "--limit", "2", "--out", tmp_path / "out", *LIMITS]
    path = os.pathsep.join(map(str, (ROOT, ROOT / "export", ROOT / "runtime")))

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments), *more],
            cwd=score_module,  # `module:function` is looked for in the working directory
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        )

    outcome = run(*SCORE)
    assert outcome.returncode == 0, outcome.stderr
    assert read(tmp_path / "out")["prompts"]["unique"] == 2
    outcome = run("--quiet", "--score", str(MODEL_FOLDER))
    assert outcome.returncode == 2
    (line,) = outcome.stderr.splitlines()
    assert f"the score {MODEL_FOLDER} names a model, which needs packages that are not installed" in line
    assert "pip install 'mara-deploy[train]'" in line
    outcome = run(*SCORE, "--baseline", str(MODEL_FOLDER))
    assert outcome.returncode == 2
    assert "a checkpoint as baseline needs packages that are not installed" in outcome.stderr.splitlines()[-1]
