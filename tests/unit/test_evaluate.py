"""The main path of an evaluation, with scripted sources and scores."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mara_deploy.evaluate.compare import Bootstrap
from mara_deploy.evaluate.evaluate import evaluate
from mara_deploy.evaluate.report import result
from mara_deploy.evaluate.store import Store
from mara_deploy.prompts import Prompt
from mara_deploy.scores.base import ScoreError, WeightedScore
from mara_deploy.scores.function import FunctionScore
from mara_runtime.errors import MaraError
from tests.unit.scripted import FACTS, OURS, PROMPTS, SCORES, THEIRS, as_number, cautions_of, compared, length, scripted


def test_combined_and_each_score(tmp_path):
    comparison = compared(tmp_path).comparisons["other"]
    # number - 0.5 · length, ours against theirs: 6.5 5.5 | 4.5 4.5 | 4.5 5.5 | 3.5 -3.5 | -2 -2 | 95.5 98 | 1.5 8.5
    assert (comparison.combined.wins, comparison.combined.ties, comparison.combined.losses) == (2, 2, 3)
    assert comparison.combined.rate == pytest.approx(-1 / 7)
    number, cost = comparison.each["number"], comparison.each["length"]
    assert (number.wins, number.ties, number.losses) == (2, 3, 2)
    assert (cost.wins, cost.ties, cost.losses) == (1, 5, 1)  # the shorter answer wins
    assert comparison.identical == 2
    worse = compared(tmp_path / "b", ours=("7",) * 7, theirs=("10",) * 7).comparisons["other"].each
    assert (worse["number"].losses, worse["length"].wins) == (7, 7)
    unsteady = iter(range(1000))  # identical answers tie even if the score is random
    scores = [WeightedScore(FunctionScore("unsteady", lambda prompts, answers: [next(unsteady) for _ in answers]))]
    ties = compared(tmp_path / "c", ours=("same",) * 7, theirs=("same",) * 7, scores=scores).comparisons["other"]
    assert (ties.combined.ties, ties.identical) == (7, 7)
    sizes = {name: part.wins + part.ties + part.losses for name, part in comparison.by_length.items()}
    assert sizes == {"longer": 1, "equal": 5, "shorter": 1}


def test_an_interrupted_run_continues_to_the_same_result(tmp_path):
    expected = compared(tmp_path / "whole")
    ours, theirs = scripted("aligned", *OURS, stop_after=3), scripted("other", *THEIRS)
    with pytest.raises(KeyboardInterrupt):
        evaluate(PROMPTS, ours, [theirs], SCORES, tmp_path / "cut", quiet=True)
    assert (len(ours.asked), len(theirs.asked)) == (3, 0)

    ours, theirs = scripted("aligned", *OURS), scripted("other", *THEIRS, stop_after=6)
    with pytest.raises(KeyboardInterrupt):
        evaluate(PROMPTS, ours, [theirs], SCORES, tmp_path / "cut", quiet=True)
    assert ours.asked == [p.text for p in PROMPTS[3:]]

    def failing(prompts, answers):
        raise RuntimeError("out of order")

    ours, theirs = scripted("aligned", *OURS), scripted("other", *THEIRS)
    broken = [SCORES[0], WeightedScore(FunctionScore("length", failing), -0.5)]
    with pytest.raises(ScoreError, match="out of order"):
        evaluate(PROMPTS, ours, [theirs], broken, tmp_path / "cut", quiet=True)
    assert (ours.asked, theirs.asked) == ([], [PROMPTS[6].text])

    assert compared(tmp_path / "cut") == expected
    for kind in ("answers", "scores"):
        for file in (tmp_path / "whole" / kind).iterdir():
            whole, cut = ((tmp_path / run / kind / file.name).read_text() for run in ("whole", "cut"))
            assert set(whole.splitlines()) == set(cut.splitlines()), file.name


def test_only_new_answers_and_scores_are_computed(tmp_path):
    """For more prompts, another baseline, another weight."""
    scored: list[tuple[str, str]] = []

    def recorded(prompts, answers):
        scored.extend(zip(prompts, answers, strict=True))
        return as_number(prompts, answers)

    score = FunctionScore("number", recorded)
    compared(tmp_path, scores=[WeightedScore(score)], prompts=PROMPTS[:3])
    ours, theirs, third = scripted("aligned", *OURS), scripted("other", *THEIRS), scripted("third", *THEIRS[::-1])
    evaluation = evaluate(PROMPTS, ours, [theirs, third], [WeightedScore(score, -5.0)], tmp_path, quiet=True)
    assert ours.asked == theirs.asked == [p.text for p in PROMPTS[3:]]
    assert len(third.asked) == 7
    assert len(scored) == len(set(scored))
    assert evaluation.aligned.combined[0] == -5.0 * 7
    assert all(source.closed for source in (ours, theirs, third))


def test_the_best_sample_competes_and_all_are_counted(tmp_path):
    theirs = [("1", "9", "9 "), ("4", "4"), *[("0",)] * 5]
    side = compared(tmp_path, theirs=theirs, scores=SCORES[:1]).baselines["other"]
    assert [answer.text for answer in side.answers[:3]] == ["9", "4", "0"]  # the first of equals
    assert side.counters["tokens"] == 3 * (3 + 2 + 5)
    assert side.text.tokens_max == 1


def test_groups_are_the_units(tmp_path):
    for first in ("a", ""):  # an empty name counts
        prompts = [Prompt(p.text, first if i < 4 else "b") for i, p in enumerate(PROMPTS)]
        by_group = compared(tmp_path, prompts=prompts, bootstrap=Bootstrap(level=0.4))
        assert by_group.comparisons["other"].combined.interval == (-1 / 7, -1 / 7)  # both groups once
        summary = result(by_group, FACTS, Bootstrap(level=0.4))
        assert (summary["bootstrap"]["unit"], summary["bootstrap"]["units"]) == ("group", 2)
        assert summary["cautions"][0].startswith("2 groups: ")


def test_prompts_of_the_training_set_are_counted_and_named(tmp_path):
    evaluation = compared(tmp_path, seen=[PROMPTS[0].text, PROMPTS[3].text])
    unseen = evaluation.comparisons["other"].unseen
    assert (unseen.wins, unseen.ties, unseen.losses) == (0, 2, 3)
    assert result(evaluation, FACTS, Bootstrap())["in_training"] == ["Question 0?", "Question 3?"]
    assert "2 of 7 prompts also occur in the training set" in cautions_of(evaluation)
    assert compared(tmp_path).comparisons["other"].unseen is None
    everything = compared(tmp_path, seen=[p.text for p in PROMPTS])
    assert everything.comparisons["other"].unseen is None
    assert "7 of 7 prompts also occur in the training set" in cautions_of(everything)


def test_a_score_that_is_not_finite_names_prompt_and_score_and_is_not_saved(tmp_path):
    def bad(prompts, answers):
        return [float("nan") if answer == "99" else 1.0 for answer in answers]

    with pytest.raises(ScoreError, match=r"s is nan for .* 'Question 5\?'"):
        compared(tmp_path, scores=[WeightedScore(FunctionScore("s", bad))])
    assert "NaN" not in (tmp_path / "scores" / "s.jsonl").read_text()
    good = [WeightedScore(FunctionScore("s", as_number))]
    assert compared(tmp_path, scores=good).baselines["other"].each["s"][5] == 99


def test_scores_of_the_same_name_have_files_of_their_own(tmp_path):
    evaluation = compared(tmp_path, scores=[WeightedScore(FunctionScore("s", f)) for f in (as_number, length)])
    assert evaluation.weights == {"s (1)": 1.0, "s (2)": 1.0}
    assert (evaluation.aligned.each["s (1)"][5], evaluation.aligned.each["s (2)"][5]) == (100, len("100 or so"))


def test_changed_settings_and_damaged_files_are_refused_before_anything_is_answered(tmp_path):
    compared(tmp_path)
    ours, theirs = scripted("aligned", *OURS), scripted("other", *THEIRS)
    theirs.settings = {"name": "other", "seed": 1}
    with pytest.raises(MaraError, match=r"other\.jsonl was made with seed null, now it is 1"):
        evaluate([*PROMPTS, Prompt("New?")], ours, [theirs], SCORES, tmp_path, quiet=True)
    assert ours.asked == []
    with pytest.raises(MaraError, match=r"length\.jsonl was made with files null, now it is \"x\""):
        compared(tmp_path, scores=[SCORES[0], replace(SCORES[1], settings={"files": "x"})])
    for path, written in (
        (tmp_path / "answers" / "aligned.jsonl", '"text": "7"'),
        (tmp_path / "scores" / "number.jsonl", "7.0"),
    ):
        whole = path.read_text()
        path.write_text(whole.replace(written, written.replace("7", "8")))
        with pytest.raises(MaraError, match=rf"{path.name}, line 2, is damaged: delete the file"):
            compared(tmp_path)
        path.write_text(whole)
    for record, damage in (({}, "answer"), ([], "answer"), ([{"text": 3}], "answer"), (3, "answer")):
        path = tmp_path / "answers" / "aligned.jsonl"
        path.unlink()
        Store(path, {"name": "aligned"}).add({PROMPTS[0].text: record})
        with pytest.raises(MaraError, match=rf"aligned\.jsonl, the {damage} to 'Question 0\?', is damaged"):
            compared(tmp_path)


def test_progress_is_on_stderr_and_quiet_is_quiet(tmp_path, capsys):
    compared(tmp_path, prompts=PROMPTS[:3])
    assert capsys.readouterr() == ("", "")
    compared(tmp_path, quiet=False)
    out, err = capsys.readouterr()
    assert out == ""
    assert "aligned: 4 to answer, 3 already saved\n" in err
