"""`mara-eval --lm-eval`: tasks beside the preference rate, over thresholds."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="needs lm-eval: `make test-eval` has it")

from lm_eval.tasks import TaskManager

from mara_runtime import AlignedDecoder
from mara_runtime.batch import Batcher
from tests.eval.test_harness import evaluate, harness, offline
from tests.export.conftest import agent, agent_file, bundle, checkpoint, command, reference, traced
from tests.export.test_eval import prompt_file

__all__ = ["agent", "agent_file", "bundle", "checkpoint", "command", "offline", "prompt_file", "reference", "traced"]

FOLDER = Path(__file__).parent


@pytest.fixture
def run(bundle, prompt_file, command, tmp_path):
    """(options, …) → what `mara-eval` returned, in the folder `out`."""
    score = ("--score", "mara_deploy.demo.score:considerate", "--out", tmp_path / "out")
    limits = ("--max-new-tokens", "24", "--threads", "1", "--lm-eval-folder", FOLDER)
    return lambda *options: command("eval", bundle("demo"), "--prompts", prompt_file, *score, *limits, *options)


def test_one_table_and_one_plot_over_thresholds(run, bundle, tmp_path, monkeypatch):
    options = ("--lm-eval", "mara_answer", "--sweep", "1e9", "--sweep", "0", "--fallback", "last")
    outcome = run(*options)
    assert outcome.code == 0, outcome.err
    points = json.loads((tmp_path / "out" / "result.json").read_text())["trade_off"]
    assert [point["threshold"] for point in points] == [None, 0.0, 1e9]
    assert points[0]["preference"] is None
    rates = [point["preference"]["rate"] for point in points[1:]]
    assert rates[0] > rates[1], "where everything is rejected, the last candidate is emitted"
    decoder = AlignedDecoder(bundle("demo"), threads=1)
    for point in points:
        chosen = {"align": False} if point["threshold"] is None else {"threshold": point["threshold"]}
        model = harness.BundleModel(decoder, **chosen, **({} if "align" in chosen else {"fallback": "last"}))
        metrics, _ = evaluate(model, ["mara_answer"], apply_chat_template=True)
        assert point["tasks"] == {
            f"mara_answer {name}": metrics["mara_answer", f"{name},none"] for name in ("exact_match", "chrf")
        }
    assert len({point["tasks"]["mara_answer chrf"] for point in points}) == 3
    (table,) = re.findall(r"what alignment costs:\n(.*\n.*\n.*\n.*)\n", outcome.out)
    assert [row.split()[0] for row in table.splitlines()] == ["threshold", "LLM", "0", "1e+09"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<circle") >= 2
    assert page.count("stroke-dasharray") == 1

    monkeypatch.setattr(Batcher, "submit", None)  # an evaluation goes on from what it has kept
    again = run(*options)
    assert (again.code, again.out) == (0, outcome.out), again.err


def test_what_no_agent_changes_is_refused_before_anything_is_answered(run, tmp_path, monkeypatch):
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))  # reading takes 9 s
    for task, message in (("mara_choice", "mara_choice asks for log-likelihoods"), ("nothing", "no task of lm-eval")):
        outcome = run("--lm-eval", task)
        assert (outcome.code, outcome.out) == (2, "")
        assert message in outcome.err.splitlines()[-1]
    assert "--lm-eval-folder is given, but no --lm-eval" in run().refusal("mara-eval")
    assert not (tmp_path / "out").exists()
