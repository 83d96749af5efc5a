"""The main path of an evaluation, with contestants and scores made for the purpose."""

from __future__ import annotations

import gc
import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest

from mara_deploy.evaluate.answers import Answer, Asking, BundleAnswers, seed_of, total_stats
from mara_deploy.evaluate.compare import Bootstrap
from mara_deploy.evaluate.evaluate import evaluate
from mara_deploy.evaluate.judge import Judge, remember
from mara_deploy.evaluate.report import _curve, _whisker, examples, html, lines, number, result
from mara_deploy.prompts import Prompt
from mara_deploy.scores.base import FunctionScore, ScoreError
from mara_runtime.config import DecodeConfig
from mara_runtime.decoder import Generation
from mara_runtime.errors import MaraError
from mara_runtime.stats import Stats

PROMPTS = [Prompt(f"Question {i}?") for i in range(7)]
STATS = {**Stats(tokens=3, decisions=2, forced=1, smallest_margin=0.5).to_json(), "accepted_rank": {"1": 1}}


class Scripted:
    """A contestant whose answers are given; counts how often it is asked, and may break off."""

    def __init__(self, name: str, answers: dict[str, Sequence[str]], stop_after: int | None = None) -> None:
        self.name, self.settings, self.closed = name, {"name": name}, False
        self._answers, self._left = answers, stop_after
        self.asked: list[str] = []

    def check(self, prompt: str) -> None:
        pass

    def __call__(self, prompt: str) -> list[Answer]:
        if self._left == 0:
            raise KeyboardInterrupt
        self._left = None if self._left is None else self._left - 1
        self.asked.append(prompt)
        return [Answer(text, len(text), "stop", STATS) for text in self._answers[prompt]]

    def close(self) -> None:
        self.closed = True


def scripted(name: str, *texts: str | Sequence[str], **options: int) -> Scripted:
    answers = {p.text: [text] if isinstance(text, str) else text for p, text in zip(PROMPTS, texts, strict=False)}
    return Scripted(name, answers, **options)


def as_number(prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
    return [float(re.sub(r"\D", "", answer) or 0) for answer in answers]


def length(prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
    return [len(answer) for answer in answers]


JUDGES = [Judge(FunctionScore("number", as_number), 1.0), Judge(FunctionScore("length", length), -0.5)]
OURS = ("7", "5", "5", "4", "same", "100 or so", "2")
THEIRS = ("6", "5", "6", "4 in many words", "same", "99", "9")


def compared(out, ours=OURS, theirs=THEIRS, judges=JUDGES, prompts=PROMPTS, **options):
    return evaluate(
        prompts, scripted("aligned", *ours), [scripted("other", *theirs)], judges, out, quiet=True, **options
    )


def test_combined_and_alone(tmp_path):
    found = compared(tmp_path).comparisons["other"]
    # number - 0.5 · length, ours against theirs: 6.5 5.5 | 4.5 4.5 | 4.5 5.5 | 3.5 -3.5 | -2 -2 | 95.5 98 | 1.5 8.5
    assert (found.combined.wins, found.combined.ties, found.combined.losses) == (2, 2, 3)
    assert found.combined.rate == pytest.approx(-1 / 7)
    number, cost = found.each["number"], found.each["length"]
    assert (number.wins, number.ties, number.losses) == (2, 3, 2)
    assert (cost.wins, cost.ties, cost.losses) == (1, 5, 1)  # the shorter answer wins
    assert found.identical == 2
    assert {name: one.wins + one.ties + one.losses for name, one in found.by_length.items()} == {
        "longer": 1,
        "equal": 5,
        "shorter": 1,
    }


def test_an_interrupted_run_goes_on_to_the_same_result(tmp_path):
    expected = compared(tmp_path / "whole")
    ours, theirs = scripted("aligned", *OURS, stop_after=3), scripted("other", *THEIRS)
    with pytest.raises(KeyboardInterrupt):
        evaluate(PROMPTS, ours, [theirs], JUDGES, tmp_path / "cut", quiet=True)
    assert (len(ours.asked), len(theirs.asked)) == (3, 0)

    ours, theirs = scripted("aligned", *OURS), scripted("other", *THEIRS, stop_after=6)
    with pytest.raises(KeyboardInterrupt):
        evaluate(PROMPTS, ours, [theirs], JUDGES, tmp_path / "cut", quiet=True)
    assert ours.asked == [p.text for p in PROMPTS[3:]]

    calls = 0

    def failing(prompts, answers):
        nonlocal calls
        calls += 1
        raise RuntimeError("the judge is out")

    ours, theirs = scripted("aligned", *OURS), scripted("other", *THEIRS)
    broken = [JUDGES[0], Judge(FunctionScore("length", failing), -0.5)]
    with pytest.raises(ScoreError, match="the judge is out"):
        evaluate(PROMPTS, ours, [theirs], broken, tmp_path / "cut", quiet=True)
    assert (ours.asked, theirs.asked, calls) == ([], [PROMPTS[6].text], 1)

    found = compared(tmp_path / "cut")
    assert found == expected
    for kind in ("answers", "scores"):
        for file in (tmp_path / "whole" / kind).iterdir():
            lines_ = [set((tmp_path / run / kind / file.name).read_text().splitlines()) for run in ("whole", "cut")]
            assert lines_[0] == lines_[1], file.name


def test_nothing_is_answered_or_scored_twice(tmp_path):
    seen: list[tuple[str, str]] = []

    def judge(prompts, answers):
        seen.extend(zip(prompts, answers, strict=True))
        return as_number(prompts, answers)

    judges = [Judge(FunctionScore("number", judge))]
    compared(tmp_path, judges=judges)
    assert len(seen) == len(set(seen)) == 14 - 2  # two prompts have the same answer twice
    ours, theirs, third = scripted("aligned", *OURS), scripted("other", *THEIRS), scripted("third", *THEIRS[::-1])
    evaluate(PROMPTS, ours, [theirs, third], judges, tmp_path, quiet=True)
    assert (ours.asked, theirs.asked) == ([], [])
    assert len(third.asked) == 7
    assert len(seen) == len(set(seen))
    assert ours.closed
    assert third.closed


def test_more_prompts_and_other_weights_need_nothing_anew(tmp_path):
    compared(tmp_path, prompts=PROMPTS[:3])
    ours = scripted("aligned", *OURS)
    heavier = [JUDGES[0], Judge(JUDGES[1].score, -5.0)]
    found = evaluate(PROMPTS, ours, [scripted("other", *THEIRS)], heavier, tmp_path, quiet=True)
    assert ours.asked == [p.text for p in PROMPTS[3:]]
    assert found.aligned.combined[0] == 7 - 5.0


def test_equal_answers_tie_though_the_score_is_not_steady(tmp_path):
    unsteady = iter(range(1000))
    judges = [Judge(FunctionScore("unsteady", lambda prompts, answers: [next(unsteady) for _ in answers]))]
    found = compared(tmp_path, ours=("same",) * 7, theirs=("same",) * 7, judges=judges).comparisons["other"]
    assert (found.combined.ties, found.identical) == (7, 7)


def test_the_best_of_several_competes_and_all_are_counted(tmp_path):
    theirs = [("1", "9", "9 "), ("4", "4"), ("0",), ("0",), ("0",), ("0",), ("0",)]
    found = compared(tmp_path, theirs=theirs, judges=JUDGES[:1])
    side = found.baselines["other"]
    assert [answer.text for answer in side.answers[:3]] == ["9", "4", "0"]  # of equals the first
    assert side.counters["tokens"] == 3 * (3 + 2 + 5)
    assert side.text.tokens_max == 1


def test_groups_are_the_units(tmp_path):
    prompts = [Prompt(p.text, "a" if i < 4 else "b") for i, p in enumerate(PROMPTS)]
    by_group = compared(tmp_path, prompts=prompts, bootstrap=Bootstrap(level=0.4))
    assert by_group.comparisons["other"].combined.interval == (-1 / 7, -1 / 7)  # both groups once
    found = result(by_group, FACTS, Bootstrap(level=0.4))
    assert (found["bootstrap"]["unit"], found["bootstrap"]["units"]) == ("group", 2)
    assert found["cautions"][0].startswith("2 groups: intervals over fewer than 20 are too narrow")


def test_an_empty_name_is_a_group_too(tmp_path):
    prompts = [Prompt(p.text, "" if i < 4 else "b") for i, p in enumerate(PROMPTS)]
    assert result(compared(tmp_path, prompts=prompts), FACTS, Bootstrap())["bootstrap"]["units"] == 2


def test_few_prompts_in_a_part_are_a_caution_too(tmp_path):
    prompts = [Prompt(f"Question {i}?") for i in range(45)]
    ours = {p.text: ["one two" if i < 40 else "one"] for i, p in enumerate(prompts)}
    theirs = {p.text: ["one"] for p in prompts}
    sides = Scripted("aligned", ours), [Scripted("other", theirs)]
    found = evaluate(prompts, *sides, JUDGES, tmp_path, seen=[p.text for p in prompts[:30]], quiet=True)
    assert result(found, FACTS, Bootstrap())["cautions"][0] == (
        "Parts of the prompts against other (equal: 5 prompts; unseen: 15 prompts): intervals over fewer than 20 are "
        "too narrow, or missing."
    )


def test_prompts_of_the_training_set_are_counted_and_named(tmp_path):
    found = compared(tmp_path, seen=[PROMPTS[0].text, PROMPTS[3].text])
    unseen = found.comparisons["other"].unseen
    assert (unseen.wins, unseen.ties, unseen.losses) == (0, 2, 3)
    shown = result(found, FACTS, Bootstrap())
    assert shown["in_training"] == ["Question 0?", "Question 3?"]
    assert "2 of 7 prompts also occur in the training set; the rates without them are given too." in shown["cautions"]
    assert compared(tmp_path).comparisons["other"].unseen is None
    everything = compared(tmp_path, seen=[p.text for p in PROMPTS])
    assert everything.comparisons["other"].unseen is None
    assert (
        "7 of 7 prompts also occur in the training set; none is left to compare without them."
        in result(everything, FACTS, Bootstrap())["cautions"]
    )


def test_a_score_that_is_not_finite_names_prompt_and_score_and_is_not_kept(tmp_path):
    def bad(prompts, answers):
        return [float("nan") if answer == "99" else 1.0 for answer in answers]

    with pytest.raises(ScoreError, match=r"the score s is nan for the answer to the prompt 'Question 5\?'"):
        compared(tmp_path, judges=[Judge(FunctionScore("s", bad))])
    assert "NaN" not in (tmp_path / "scores" / "s.jsonl").read_text()
    good = [Judge(FunctionScore("s", as_number))]
    assert compared(tmp_path, judges=good).baselines["other"].each["s"][5] == 99


def test_two_scores_of_one_name_are_told_apart(tmp_path):
    judges = [Judge(FunctionScore("s", as_number)), Judge(FunctionScore("s", length))]
    found = compared(tmp_path, judges=judges)
    assert found.weights == {"s (1)": 1.0, "s (2)": 1.0}
    assert found.aligned.each["s (2)"][5] == len("100 or so")


def test_where_a_prompt_ends_matters_and_names_may_be_long(tmp_path):
    combined, (store,) = remember([Judge(FunctionScore("s" * 300, length))], tmp_path)
    with store:
        assert combined(["ab", "a"], ["c", "bc"]) == [1.0, 2.0]


def test_changed_settings_are_refused_before_anything_is_answered(tmp_path):
    compared(tmp_path)
    ours, theirs = scripted("aligned", *OURS), scripted("other", *THEIRS)
    theirs.settings = {"name": "other", "seed": 1}
    with pytest.raises(MaraError, match=r"other\.jsonl was made with seed null, now it is 1"):
        evaluate([*PROMPTS, Prompt("New?")], ours, [theirs], JUDGES, tmp_path, quiet=True)
    assert ours.asked == []
    with pytest.raises(MaraError, match=r"length\.jsonl was made with files null, now it is \"x\""):
        compared(tmp_path, judges=[JUDGES[0], Judge(JUDGES[1].score, -0.5, {"files": "x"})])


def test_a_file_of_something_else_is_refused(tmp_path):
    compared(tmp_path)
    path = tmp_path / "answers" / "aligned.jsonl"
    path.write_text(path.read_text().replace('"finish_reason"', '"reason"'))
    with pytest.raises(MaraError, match="does not hold answers"):
        compared(tmp_path)


def test_progress_is_on_stderr_and_quiet_is_quiet(tmp_path, capsys):
    compared(tmp_path, prompts=PROMPTS[:3])
    assert capsys.readouterr() == ("", "")
    evaluate(PROMPTS, scripted("aligned", *OURS), [scripted("other", *THEIRS)], JUDGES, tmp_path)
    out, err = capsys.readouterr()
    assert out == ""
    assert "aligned: 4 to answer, 3 kept\n" in err


# ── counters and seeds ───────────────────────────────────────────────────────────────────────────────────────────────


def test_counters_add_up():
    one = {
        "tokens": 3,
        "accepted_rank": {"1": 2, "10": 1},
        "smallest_margin": 0.5,
        "decode_ms": 1.5,
        "tokens_per_second": 2,
    }
    two = {
        "tokens": 5,
        "accepted_rank": {"2": 1, "1": 1},
        "smallest_margin": None,
        "decode_ms": 2.5,
        "tokens_per_second": 9,
    }
    assert total_stats([one, two]) == {
        "tokens": 8,
        "accepted_rank": {"1": 3, "2": 1, "10": 1},
        "smallest_margin": 0.5,
        "decode_ms": 4.0,
        "tokens_per_second": 1500.0,  # the first token of each comes with the prompt
    }
    assert list(total_stats([one, two])["accepted_rank"]) == ["1", "2", "10"]
    assert total_stats([two])["smallest_margin"] is None


def test_where_nothing_was_decoded_there_is_no_speed():
    for decode_ms in (0.0, 2.5):
        one = Stats(tokens=1, decode_ms=decode_ms).to_json()
        assert total_stats([one, one])["tokens_per_second"] == 0.0


def test_a_seed_depends_on_prompt_sample_and_seed():
    seeds = {seed_of(seed, prompt, sample) for seed in (0, 1) for prompt in ("a", "b") for sample in (0, 1)}
    assert len(seeds) == 8
    assert seed_of(0, "a") == seed_of(0, "a", 0)
    assert all(0 <= seed < 2**63 for seed in seeds)


class Recorder:
    """Stands in for a decoder: keeps what it is asked."""

    def __init__(self) -> None:
        self.calls: list[str | tuple[str, int, bool, object]] = []

    def forget(self) -> None:
        self.calls.append("forget")

    def generate(self, prompt, config, *, raw, template):
        self.calls.append((prompt, config.seed, raw, template))
        return Generation([1], "text", "stop", Stats(tokens=1), {}, config)


def test_every_answer_of_a_bundle_has_a_seed_of_its_own_and_a_decoder_that_knows_nothing():
    decoder = Recorder()
    config = DecodeConfig(align=False, sample=True, seed=5)
    contestant = BundleAnswers("best-of-2", decoder, config, Asking(True, {"a": 1}), samples=2)
    assert len(contestant("one") + contestant("two")) == 4
    assert decoder.calls == [
        call
        for prompt in ("one", "two")
        for sample in (0, 1)
        for call in ("forget", (prompt, seed_of(5, prompt, sample), True, {"a": 1}))
    ]


class Loaded:
    """Stands in for a decoder whose engine, like TensorRT, takes memory as it goes."""

    def __init__(self, folder) -> None:
        self.bundle, self.engine = SimpleNamespace(path=lambda name: folder / name), self
        self.slots = 512

    def describe(self):
        return {"name": "tensorrt", "gpu": "some", "memory": {"slots": self.slots}}


def test_the_memory_of_an_engine_is_no_setting(tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    decoder = Loaded(tmp_path)
    contestant = BundleAnswers("aligned", decoder, DecodeConfig(), Asking())
    before = contestant.settings
    decoder.slots *= 2
    assert contestant.settings == before
    assert before["engine gpu"] == "some"


# ── the report ───────────────────────────────────────────────────────────────────────────────────────────────────────

FACTS = {
    "command": "mara-eval BUNDLE --score '<b>'",
    "score": "+1 × number -0.5 × length",
    "bundle": {"name": "polite", "model": "tiny", "agent": "a.pth", "precision": "fp32"},
    "prompts": {
        "file": "prompts.txt", "read": 9, "duplicates": 2, "refused": 0, "limit": None, "unique": 7,
        "training_file": "train.json",
    },
    "decoding": {},
    "versions": {"python": "3"},
}  # fmt: skip


class Tags(HTMLParser):
    """Checks that tags are closed in order, and collects the texts and the names."""

    VOID = ("meta", "br", "hr", "img", "link", "input")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.names: set[str] = set()
        self.links: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.names.add(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.names.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, self.getpos()

    def handle_data(self, data):
        self.texts.append(data)


def page(found) -> Tags:
    tags = Tags()
    tags.feed(html(found, result(found, FACTS, Bootstrap()), 2))
    tags.close()
    assert tags.open == []
    return tags


def test_the_page_is_whole_needs_nothing_else_and_runs_nothing(tmp_path):
    attack = '<script>alert(1)</script><img src=x onerror=alert(1)> {{ 7 * 7 }} 5 & "quotes"'
    ours = (attack, *OURS[1:])
    found = compared(tmp_path, ours=ours, seen=[PROMPTS[1].text])
    tags = page(found)
    assert {"script", "img", "link", "iframe"} & tags.names == set()
    assert tags.links == []
    assert attack in tags.texts
    assert not re.search(r"url\(|https?://|@import", html(found, result(found, FACTS, Bootstrap()), 2))


def test_the_page_says_what_the_result_says(tmp_path):
    found = compared(tmp_path)
    text = " ".join(" ".join(page(found).texts).split())
    assert "−14.3 %" in text
    assert "wins 2, ties 2, losses 3" in text
    assert "9 read, 2 duplicates left out: 7." in text
    assert "weight −0.5" in text
    shown = result(found, FACTS, Bootstrap())
    for caution in shown["cautions"]:
        assert caution in text
    printed = "\n".join(lines(shown))
    assert "-14.3 %" in printed
    assert "wins 2, ties 2, losses 3" in printed


def test_the_result_is_json_and_survives_it(tmp_path):
    shown = result(compared(tmp_path), FACTS, Bootstrap())
    assert json.loads(json.dumps(shown, allow_nan=False))["comparisons"]["other"]["combined"]["wins"] == 2


def test_examples_are_the_worst_the_best_and_a_draw(tmp_path):
    worst, best, drawn = examples(compared(tmp_path), "other", 2)
    assert [item["prompt"] for item in worst["items"]] == ["Question 6?", "Question 5?"]
    assert [item["prompt"] for item in best["items"]] == ["Question 3?", "Question 0?"]
    assert len(drawn["items"]) == 2
    everything = [item["prompt"] for kind in examples(compared(tmp_path), "other", 100) for item in kind["items"]]
    assert sorted(everything) == [p.text for p in PROMPTS]
    assert [side["name"] for side in worst["items"][0]["sides"]] == ["aligned", "other"]
    only_ties = compared(tmp_path / "ties", ours=("a",) * 7, theirs=("a",) * 7)
    assert [kind["title"] for kind in examples(only_ties, "other", 2)] == ["Drawn at random from the rest"]


def told(found) -> list[str]:
    return result(found, FACTS, Bootstrap())["cautions"]


def test_a_reader_is_warned(tmp_path):
    def warned(name, **options):
        return " ".join(told(compared(tmp_path / name, **options)))

    assert "of the answers of other contain no word" in warned("empty", theirs=("?",) * 7)
    assert "Aligned answers have 9 words on average, those of other 1" in warned("long", ours=("a " * 9,) * 7)
    assert "every prompt ended alike" in warned("alike", ours=("9",) * 7, theirs=("1",) * 7)
    assert "every prompt ended alike" not in warned("not alike", ours=("9",) * 7, theirs=("1",) * 6 + ("99",))
    ours, theirs = scripted("aligned", *OURS), scripted("best-of-3", *THEIRS)
    found = evaluate(PROMPTS, ours, [theirs], JUDGES, tmp_path / "best", quiet=True)
    assert "best-of-3 picks its answer by the very score" in " ".join(told(found))


def test_answers_that_are_cut_off_or_shorter_are_a_caution(tmp_path):
    found = compared(tmp_path, theirs=("a " * 9,) * 7)
    assert any(c.startswith("Aligned answers have 1 words on average, those of other 9:") for c in told(found))
    side = found.baselines["other"]
    for share, caution in ((0.1, True), (0.09, False)):
        found.baselines["other"] = replace(side, text=replace(side.text, cut_off=share))
        assert ("10% of the answers of other are cut off: raise --max-new-tokens." in told(found)) == caution


@pytest.mark.parametrize(
    ("tokens", "counters", "said"),
    [
        ((9, 9), {}, "raise --max-new-tokens."),
        ((9, 8), {}, "1 by --max-new-tokens, 1 by the bundle's context, which is full: export it with a larger "),
        ((8, 3), {}, "by the bundle's context, which is full: export it with a larger --max-context, or ask shorter"),
        ((8, 3), None, "by its context, which is full: ask shorter prompts."),
    ],
)
def test_the_caution_says_what_cut_answers_off(tmp_path, tokens, counters, said):
    found = compared(tmp_path)
    side = found.baselines["other"]
    cut = [replace(answer, tokens=n, finish_reason="length") for answer, n in zip(side.answers, tokens, strict=False)]
    answers = [*cut, *(replace(answer, tokens=2) for answer in side.answers[2:])]
    found.baselines["other"] = replace(side, answers=answers, counters=counters, text=replace(side.text, cut_off=2 / 7))
    facts = {**FACTS, "decoding": {"aligned": {"max_new_tokens": 9}, "other": {"max_new_tokens": 9}}}
    (caution,) = (c for c in result(found, facts, Bootstrap())["cautions"] if "cut off" in c)
    assert caution.startswith(f"29% of the answers of other are cut off: {said}")


def test_a_refused_store_of_scores_leaves_no_other_open(tmp_path):
    _, stores = remember([JUDGES[0], replace(JUDGES[1], settings={"code": "old"})], tmp_path)
    for store in stores:
        with store:
            pass
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with pytest.raises(MaraError, match="was made with code"):
            remember([JUDGES[0], replace(JUDGES[1], settings={"code": "new"})], tmp_path)
        gc.collect()
    assert [str(one.message) for one in told] == []


def test_an_example_says_whether_it_was_seen_and_cut_off(tmp_path):
    found = compared(tmp_path, seen=[PROMPTS[6].text])
    found.aligned.answers[6] = replace(found.aligned.answers[6], finish_reason="length")
    worst = examples(found, "other", 2)[0]["items"]
    assert [item["seen"] for item in worst] == [True, False]
    assert [[side["cut_off"] for side in item["sides"]] for item in worst] == [[True, False], [False, False]]


def test_the_drawings_by_hand():
    ours, theirs = SimpleNamespace(combined=[1.0, 0.0, 0.0]), SimpleNamespace(combined=[0.0, 2.0, 0.0])
    curve = _curve(ours, theirs, width=300.0, height=100.0)  # of -2, 0 and 1
    level = "0.0,50.0 100.0,50.0 100.0,50.0 200.0,50.0"
    assert curve["win"] == f"0,50.0 {level} 200.0,25.0 300.0,25.0 300.0,50.0"
    level = "100.0,50.0 200.0,50.0 200.0,50.0 300.0,50.0"
    assert curve["loss"] == f"0,50.0 0.0,100.0 100.0,100.0 {level} 300.0,50.0"
    assert (curve["least"], curve["most"]) == (-2.0, 1.0)
    assert _whisker({"rate": 0.0, "interval": (-1.0, 0.5)}) == {"low": 6.0, "at": 90.0, "high": 132.0}
    assert _whisker({"rate": 1.0, "interval": None}) == {"low": 174.0, "at": 174.0, "high": 174.0}


def test_figures_have_four_digits():
    assert [number(value) for value in (1234.567, 0.000123456, 1234567, None)] == [
        "1235",
        "0.0001235",
        "1,234,567",
        "–",
    ]
