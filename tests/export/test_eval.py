"""`mara-eval` on real bundles: what it compares, that it continues where it stopped, and what it refuses."""

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
from mara_deploy.demo import MODEL_FOLDER
from mara_deploy.demo.prompts import prompts
from mara_deploy.evaluate.answers import Answer, AnswerSource, BundleAnswers, PromptFormat
from mara_deploy.evaluate.checkpoint import CheckpointAnswers
from mara_deploy.files import run_lock
from mara_deploy.scores import load
from mara_deploy.scores.function import FunctionScore
from mara_runtime.config import DecodeConfig
from mara_runtime.decoder import AlignedDecoder
from mara_runtime.errors import MaraError
from tests import checkpoints

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = prompts(6, seed=5, held_out_split=True)
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
    path.write_text(json.dumps([{"instruction": p.text, "topic": p.group[0]} for p in (*PROMPTS, PROMPTS[2])]))
    return path


@pytest.fixture
def evaluate(bundle, prompt_file, command):
    """(options, …) → CommandResult on the demo's bundle."""
    return lambda *options: command("eval", bundle("demo"), "--prompts", prompt_file, *LIMITS, *options)


def read(out: Path) -> dict[str, Any]:
    return json.loads((out / "result.json").read_text(encoding="utf-8"))


def test_baselines_side_by_side(evaluate, tmp_path):
    """The bundle without its agent, greedy, sampled, best of three; and its own checkpoint, which ties with greedy."""
    training, out, checkpoint = tmp_path / "training.txt", tmp_path / "out", MODEL_FOLDER.name
    training.write_text(f"{PROMPTS[4].text}\nAnother one?\n")
    names = ["greedy", "sample", "best-of-3", checkpoint]
    outcome = evaluate(
        *SCORE, "--group-by", "topic", "--training-prompts", training, "--out", out, "--baseline", MODEL_FOLDER,
        *(part for name in names[:3] for part in ("--baseline", name)),
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    found = read(out)
    assert found["prompts"] == {
        "file": "prompts.json", "read": 7, "duplicates": 1, "refused": 0, "limit": None, "unique": 6,
        "training_file": "training.txt", "remarks": [],
    }  # fmt: skip
    assert found["in_training"] == [PROMPTS[4].text]
    groups = len({p.group[0] for p in PROMPTS})
    assert (found["bootstrap"]["unit"], found["bootstrap"]["units"]) == ("group", groups)
    assert set(found["comparisons"]) == set(names)
    for comparison in found["comparisons"].values():
        combined = comparison["combined"]
        assert combined["wins"] + combined["ties"] + combined["losses"] == 6
        assert combined["rate"] == pytest.approx((combined["wins"] - combined["losses"]) / 6)
    # the best of three is at least as good as the first of them, which is the sampled answer
    means = {name: comparison["combined"]["baseline_mean"] for name, comparison in found["comparisons"].items()}
    assert means["best-of-3"] > means["sample"]
    counters = {name: side["counters"] for name, side in found["sides"].items()}
    assert counters["aligned"]["decisions"] > 0
    assert counters["greedy"]["decisions"] == 0
    assert counters["best-of-3"]["tokens"] > counters["sample"]["tokens"] * 2
    assert PROMPTS[0].text in (out / "report.html").read_text(encoding="utf-8")
    assert "aligned against greedy:" in outcome.out
    assert str(out / "report.html") in outcome.out

    assert found["comparisons"][checkpoint] == found["comparisons"]["greedy"]
    assert counters[checkpoint] is None
    texts = {
        name: [
            (answer["text"], answer["tokens"], answer["finish_reason"])
            for line in (out / "answers" / f"{name}.jsonl").read_text().splitlines()[1:]
            for answer in json.loads(line)["record"]
        ]
        for name in (checkpoint, "greedy")
    }
    assert texts[checkpoint] == texts["greedy"]


# ── other checkpoints ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_checkpoint_decodes_like_a_bundle_whatever_its_generation_config(checkpoint, tmp_path, bundle):
    """Penalties and sampling of the generation config are ignored; its list of end-of-sequence ids is not."""
    folder = tmp_path / "tuned"
    shutil.copytree(checkpoint("qwen2"), folder)
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == list(checkpoints.EOS_IDS)
    (folder / "generation_config.json").write_text(
        json.dumps({**generation, "repetition_penalty": 5.0, "do_sample": True, "temperature": 9.0, "top_k": 3})
    )
    plain = DecodeConfig(max_new_tokens=40, align=False)
    decoder = AlignedDecoder(bundle("qwen2"), threads=1)
    theirs = CheckpointAnswers(str(folder), plain, PromptFormat())
    ours = BundleAnswers("greedy", decoder, plain, PromptFormat(), conversations=4)
    prompts = [f"Tell me about number {i}." for i in range(24)]
    ends = {decoder.generate(prompt, plain).token_ids[-1]: prompt for prompt in prompts}
    assert ends.keys() > set(checkpoints.EOS_IDS)  # each of the two ids ends an answer, and some answers are truncated
    asked = [*(ends[token] for token in checkpoints.EOS_IDS), *prompts[:4]]
    for a, b in zip(answered(theirs, *asked), answered(ours, *asked), strict=True):
        assert (a.text, a.tokens, a.finish_reason) == (b.text, b.tokens, b.finish_reason)


def answered(source: AnswerSource, *prompts: str) -> list[Answer]:
    """One answer to each prompt."""
    found = dict(source(prompts))
    return [found[index][0] for index in range(len(prompts))]


def answers_of(folder: Path, *, raw: bool = False, **options: Any) -> CheckpointAnswers:
    return CheckpointAnswers(str(folder), DecodeConfig(align=False, **options), PromptFormat(raw=raw))


def test_a_checkpoint_samples_reproducibly_from_the_candidates(checkpoint):
    best, narrow, wide = (
        answers_of(checkpoint("llama"), raw=True, max_new_tokens=12, **options)
        for options in ({}, {"sample": True, "top_k": 1}, {"sample": True, "top_p": 1.0, "temperature": 3.0})
    )
    prompts = ["One", "Two", "Three"]
    assert answered(narrow, *prompts) == answered(best, *prompts)
    state = torch.get_rng_state()
    first = answered(wide, *prompts)
    assert torch.equal(torch.get_rng_state(), state)
    wide.close()  # a later call loads the model again
    assert first == answered(wide, *prompts) != answered(best, *prompts)


def test_a_baseline_without_a_chat_template_is_a_caution(evaluate, tmp_path):
    """Terminal, result and report say so, and the settings what each side got."""
    other = tmp_path / "plain"
    shutil.copytree(MODEL_FOLDER, other)
    (other / "chat_template.jinja").unlink()
    outcome = evaluate(*SCORE, "--limit", 2, "--out", tmp_path / "out", "--baseline", other)
    assert outcome.code == 0, outcome.err
    caution = "aligned is asked through its chat template, plain with plain text, without a chat template"
    assert f"note: {caution}" in outcome.out
    found = read(tmp_path / "out")
    assert any(caution in text for text in found["cautions"])
    assert caution in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert {name: settings["raw"] for name, settings in found["decoding"].items()} == {"aligned": False, "plain": True}


def test_stop_texts_and_the_context_end_a_checkpoints_answer(checkpoint):
    folder = checkpoint("mistral")
    (whole,) = answered(answers_of(folder, max_new_tokens=30), "One")
    stop = whole.text[4:6]
    (cut,) = answered(answers_of(folder, max_new_tokens=30, stop=(stop,)), "One")
    assert (cut.text, cut.finish_reason) == (whole.text[: whole.text.index(stop)], "stop")
    long = answers_of(folder, raw=True, max_new_tokens=10_000)
    (most,) = answered(long, "a b c d e f g h " * 30)
    assert most.tokens < 512
    with pytest.raises(MaraError, match=r"the prompt has \d+ tokens; mistral has a context of 512"):
        long.check("a b c d e f g h " * 60)


def test_settings_of_a_checkpoint_include_its_weights_and_options(checkpoint, tmp_path):
    folder = tmp_path / "qwen2"
    shutil.copytree(checkpoint("qwen2"), folder)
    first = answers_of(folder).settings
    assert first == answers_of(checkpoint("qwen2")).settings
    assert answers_of(folder, sample=True, seed=3).settings["seed"] == 3
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    assert answers_of(folder).settings["files"] != first["files"]


# ── what is refused; for the options alone see tests/unit/test_refusals.py ───────────────────────────────────────────


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--score", "scores_of_the_test:none"), "has no function 'none'"),
        ((*SCORE, "--score-template", "{prompt}{answer}"), "--score-template"),
        (("--score", "scores_of_the_test:bad"), "the score scores_of_the_test:bad is inf"),
        ((*SCORE, "--baseline", "gredy"), "--baseline is 'gredy'"),
        ((*SCORE, "--baseline", "greedy", "--baseline", "greedy"), "--baseline greedy is given twice"),
        ((*SCORE, "--temperature", "1", "--baseline", MODEL_FOLDER), "--temperature is 1.0, but no --baseline samples"),
        ((*SCORE, "--template", "tokenize=false", "--baseline", MODEL_FOLDER), "--template sets 'tokenize'"),
        ((*SCORE, "--group-by", "nothing"), "entry 1 has no key 'nothing'"),
        ((*SCORE, "--training-prompts", "none.txt"), "none.txt cannot be read: No such file"),
        ((*SCORE, "--prompts", "demo-final", "--group-by", "group"), "--group-by is 'group'"),
    ],
)
def test_bad_input_is_one_line(evaluate, tmp_path, options, named):
    outcome = evaluate("--out", tmp_path / "out", "--quiet", *options)
    assert (outcome.code, outcome.out) == (2, "")
    (line,) = outcome.err.splitlines()
    assert named in line
    assert not (tmp_path / "out" / "result.json").exists()


def test_a_score_that_fails_does_so_before_anything_is_answered(evaluate, score_module, tmp_path):
    """And when it is mended, or fails later, the same command goes on."""
    source, out = score_module / "mended.py", tmp_path / "out"
    options = ("--score", f"{source}:judge", "--limit", 2, "--out", out, "--quiet")

    def write(value: str) -> None:
        sys.modules.pop("mended", None)
        source.write_text(f"def judge(_, answers): return {value}")

    write("[1 / (len(a) - 4) for a in answers]")  # "Yes."
    assert "mended.py:judge failed with ZeroDivisionError" in evaluate(*options).refusal("mara-eval")
    assert not out.exists()
    write("[1 / (len(a) == 4) for a in answers]")
    assert "mended.py:judge failed with ZeroDivisionError" in evaluate(*options).refusal("mara-eval")
    before = (out / "answers" / "aligned.jsonl").read_bytes()
    write("[len(a) for a in answers]")
    assert evaluate(*options).code == 0
    assert (out / "answers" / "aligned.jsonl").read_bytes() == before


def test_quiet_prints_nothing_also_for_sharded_checkpoints(evaluate, tmp_path):
    """transformers draws a progress bar for several shards."""
    other, judge = tmp_path / "other", tmp_path / "judge"
    config = LlamaConfig.from_pretrained(MODEL_FOLDER, num_labels=1)
    for kind, folder in ((LlamaForCausalLM, other), (LlamaForSequenceClassification, judge)):
        kind(config).save_pretrained(folder, max_shard_size="500KB")
        assert (folder / "model.safetensors.index.json").is_file()
        for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            shutil.copy(MODEL_FOLDER / file, folder)
    logging.enable_progress_bar()
    outcome = evaluate("--limit", 1, "--out", tmp_path / "out", "--quiet", "--score", judge, "--baseline", other)
    assert (outcome.code, outcome.out, outcome.err) == (0, "", "")


def test_a_folder_in_use_is_left_alone(evaluate, tmp_path):
    """One of something else, and one of another run."""
    mine, out = tmp_path / "mine", tmp_path / "out"
    mine.mkdir()
    (mine / "letter.txt").write_text("Dear")
    with run_lock(out):
        for folder, named in ((mine, f"{mine} exists"), (out, f"another run is using {out}")):
            outcome = evaluate(*SCORE, "--out", folder, "--limit", 1, "--quiet")
            assert (outcome.code, outcome.out) == (2, "")
            assert named in outcome.err
    assert [path.name for path in mine.iterdir()] == ["letter.txt"]
    assert list(out.iterdir()) == []
    assert evaluate(*SCORE, "--out", out, "--limit", 1, "--quiet").code == 0
    assert sorted(path.name for path in out.iterdir()) == ["answers", "report.html", "result.json", "scores"]


def length(prompts, answers):
    return [len(answer) for answer in answers]


def test_saved_scores_of_a_model_are_valid_for_a_type_of_device(monkeypatch):
    """A GPU computes in another precision; a function does not depend on it."""
    monkeypatch.setattr(load, "load_score", lambda spec, **_: FunctionScore(spec, length, "the same"))
    options = [ScoreOption("demo"), ScoreOption("someone/reward")]
    settings = [[judge.settings for judge in judges(options, device, None)] for device in (None, "cpu", "cuda:1")]
    assert [function for function, _ in settings] == [{"template": None, "code or weights": "the same"}] * 3
    assert [model["device"] for _, model in settings] == ["cpu", "cpu", "cuda"]


def test_prompts_that_the_bundle_rejects(bundle, tmp_path, command):
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


def test_the_demos_prompt_sets(evaluate, tmp_path):
    sets = ("--prompts", "demo-final", "--training-prompts", "demo", "--score", "demo")
    assert evaluate(*sets, "--limit", "3", "--out", tmp_path / "out", "--quiet").code == 0
    found = read(tmp_path / "out")
    assert (found["prompts"]["file"], found["prompts"]["unique"]) == ("demo-final", 3)
    assert found["in_training"] == []
    assert found["bootstrap"]["unit"] == "group"


def test_a_device_without_pytorch_can_evaluate_with_python_scores(bundle, prompt_file, tmp_path, score_module):
    """In a process of its own: a model as score or baseline is refused with what to install."""
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'onnx', 'optimum', 'mara_export'):\n"
        "    sys.modules[name] = None\n"
        "from mara_deploy.commands.eval import main\n"
        f"args, model = sys.argv[1:], {str(MODEL_FOLDER)!r}\n"
        f"print([main([*args, *more]) for more in ({SCORE}, ('--score', model), {SCORE} + ('--baseline', model))])"
    )
    arguments = ["--prompts", prompt_file, "--limit", "2", "--out", tmp_path / "out", *LIMITS, "--quiet"]
    path = os.pathsep.join(map(str, (ROOT, ROOT / "export", ROOT / "runtime")))
    outcome = subprocess.run(
        [sys.executable, "-c", code, *map(str, (bundle("demo"), *arguments))],
        cwd=score_module,  # `module:function` is importable from the working directory
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert outcome.stdout == "[0, 2, 2]\n", outcome.stderr
    assert read(tmp_path / "out")["prompts"]["unique"] == 2
    score, baseline = outcome.stderr.splitlines()
    assert f"the score {MODEL_FOLDER}" in score
    for line in (score, baseline):
        assert "pip install 'mara-deploy[train]'" in line
