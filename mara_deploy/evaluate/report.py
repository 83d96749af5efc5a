"""What an evaluation found, for programs (JSON) and for people (HTML): the same figures in both."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from typing import Any

from mara_deploy.evaluate.compare import Bootstrap, number_units
from mara_deploy.evaluate.evaluate import Evaluation, Side

FEW_UNITS = 20
"""Bootstrap intervals over fewer are markedly too narrow."""


def result(evaluation: Evaluation, facts: Mapping[str, Any], bootstrap: Bootstrap) -> dict[str, Any]:
    """Everything but the texts, as plain values. facts: what the command knows of bundle, prompts and settings."""
    units = int(number_units([prompt.group for prompt in evaluation.prompts]).max()) + 1
    grouped = evaluation.prompts[0].group is not None
    return {
        **facts,
        "scores": evaluation.weights,
        "bootstrap": {
            "unit": "group" if grouped else "prompt",
            "units": units,
            "resamples": bootstrap.resamples,
            "level": bootstrap.level,
            "seed": bootstrap.seed,
        },
        "in_training": [prompt.text for prompt in evaluation.prompts if prompt.text in evaluation.seen],
        "sides": {side.name: _side(side) for side in (evaluation.aligned, *evaluation.baselines.values())},
        "comparisons": {
            name: {
                "combined": found.combined.to_json(),
                "each": {score: one.to_json() for score, one in found.each.items()},
                "unseen": found.unseen.to_json() if found.unseen else None,
                "identical": found.identical,
                "by_length": {length: one.to_json() for length, one in found.by_length.items()},
            }
            for name, found in evaluation.comparisons.items()
        },
        "cautions": cautions(evaluation, units, grouped, facts.get("decoding", {})),
    }


def _side(side: Side) -> dict[str, Any]:
    return {"text": side.text.to_json(), "counters": side.counters}


def cautions(evaluation: Evaluation, units: int, grouped: bool, decoding: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What a reader should know before believing the rates, one sentence each. decoding: settings of the sides."""
    found = []
    unit = "group" if grouped else "prompt"
    if units < FEW_UNITS:
        found.append(f"{_counted(units, unit)}: intervals over fewer than {FEW_UNITS} are too narrow, or missing.")
    else:
        for name, against in evaluation.comparisons.items():
            parts = {**against.by_length, "unseen": against.unseen}
            few = [
                f"{part}: {_counted(one.units, unit)}" for part, one in parts.items() if one and one.units < FEW_UNITS
            ]
            if few:
                found.append(
                    f"Parts of the prompts against {name} ({'; '.join(few)}): intervals over fewer than {FEW_UNITS} "
                    "are too narrow, or missing."
                )
    if evaluation.seen:
        seen, all_of_them = len(evaluation.seen), len(evaluation.prompts)
        found.append(
            f"{seen} of {all_of_them} prompts also occur in the training set; "
            + (
                "none is left to compare without them."
                if seen == all_of_them
                else "the rates without them are given too."
            )
        )
    for name, side in (("aligned", evaluation.aligned), *evaluation.baselines.items()):
        if side.text.cut_off >= 0.1:
            mend = _mend_of_cut_off(side, decoding.get(name, {}).get("max_new_tokens"))
            found.append(f"{side.text.cut_off:.0%} of the answers of {name} are cut off: {mend}.")
        if side.text.empty >= 0.05:
            found.append(f"{side.text.empty:.0%} of the answers of {name} contain no word.")
    ours = evaluation.aligned.text.words_mean
    for name, side in evaluation.baselines.items():
        theirs = side.text.words_mean
        if abs(ours - theirs) > 0.2 * max(theirs, 1.0):
            found.append(
                f"Aligned answers have {ours:.0f} words on average, those of {name} {theirs:.0f}: "
                "see the rates by length, as scores often favour long or short answers."
            )
        comparison = evaluation.comparisons[name].combined
        if [comparison.wins, comparison.ties, comparison.losses].count(0) == 2:
            found.append(
                f"Against {name} every prompt ended alike: a bootstrap shows no spread then, which does not mean "
                "that there is none."
            )
        if name.startswith("best-of-"):
            found.append(f"{name} picks its answer by the very score that compares it.")
    return found


def _mend_of_cut_off(side: Side, limit: int | None) -> str:
    """What lets the answers of a side end by themselves. limit: its --max-new-tokens; None: not known."""
    cut = [answer.tokens for answer in side.answers if answer.finish_reason == "length"]
    full = sum(tokens < limit for tokens in cut) if limit is not None else 0  # the context ended before the limit
    if not full:
        return "raise --max-new-tokens"
    context = (
        "its context, which is full: ask shorter prompts"
        if side.counters is None  # another checkpoint, which is as long as it is
        else "the bundle's context, which is full: export it with a larger --max-context, or ask shorter prompts"
    )
    if full == len(cut):
        return f"by {context}"
    return f"{len(cut) - full} by --max-new-tokens, {full} by {context}"


def lines(found: Mapping[str, Any]) -> list[str]:
    """The result in a few lines for the terminal."""
    bootstrap, prompts = found["bootstrap"], found["prompts"]
    counted = [_counted(prompts[key], what) for key, what in (("unique", "prompt"), ("duplicates", "duplicate"))]
    units = _counted(bootstrap["units"], bootstrap["unit"])
    out = [
        f"{prompts['file']}: {counted[0]}, {counted[1]} left out; {bootstrap['level']:.0%} intervals over {units}",
    ]
    width = max(len(name) for name in found["scores"])
    for name, comparison in found["comparisons"].items():
        out.append(f"aligned against {name}:")
        rows = [("combined", comparison["combined"])]
        if len(found["scores"]) > 1:
            rows += comparison["each"].items()
        if comparison["unseen"]:
            rows.append(("unseen", comparison["unseen"]))
        for row, one in rows:
            out.append(
                f"  {row:<{max(width, 8)}}  {percent(one['rate']):>8} {span(one['interval']):<20} "
                f"wins {one['wins']}, ties {one['ties']}, losses {one['losses']}; "
                f"mean {one['mean']:.4g} against {one['baseline_mean']:.4g}"
            )
    return out + [f"note: {caution}" for caution in found["cautions"]]


def examples(evaluation: Evaluation, name: str, count: int) -> list[dict[str, Any]]:
    """Prompts with both answers: the worst losses, the greatest wins, and some drawn at random, `count` of each."""
    ours, theirs = evaluation.aligned, evaluation.baselines[name]
    difference = [a - b for a, b in zip(ours.combined, theirs.combined, strict=True)]
    ranked = sorted(range(len(difference)), key=lambda i: (difference[i], i))
    worst = [i for i in ranked[:count] if difference[i] < 0]
    best = [i for i in ranked[::-1][:count] if difference[i] > 0]
    rest = [i for i in range(len(difference)) if i not in {*worst, *best}]
    drawn = sorted(random.Random(0).sample(rest, min(count, len(rest))))
    return [
        {"title": title, "items": [_example(evaluation, theirs, i) for i in chosen]}
        for title, chosen in (
            ("Worst losses", worst),
            ("Greatest wins", best),
            ("Drawn at random from the rest", drawn),
        )
        if chosen
    ]


def _example(evaluation: Evaluation, theirs: Side, i: int) -> dict[str, Any]:
    prompt = evaluation.prompts[i]
    return {
        "prompt": prompt.text,
        "group": prompt.group,
        "seen": prompt.text in evaluation.seen,
        "sides": [
            {
                "name": side.name,
                "text": side.answers[i].text,
                "tokens": side.answers[i].tokens,
                "cut_off": side.answers[i].finish_reason == "length",
                "combined": side.combined[i],
                "each": {name: values[i] for name, values in side.each.items()},
                "stats": side.answers[i].stats,
            }
            for side in (evaluation.aligned, theirs)
        ],
    }


def html(evaluation: Evaluation, found: Mapping[str, Any], count: int) -> str:
    """A page that needs nothing else: no script, no font, no picture from elsewhere. count: examples of each kind."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update({f.__name__: _with_minus_signs(f) for f in (percent, span, number)})
    source = files("mara_deploy.evaluate").joinpath("report.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(source).render(
        found=found,
        examples={name: examples(evaluation, name, count) for name in evaluation.baselines},
        curves={name: _curve(evaluation.aligned, side) for name, side in evaluation.baselines.items()},
        whisker=_whisker,
    )


def _with_minus_signs(shown: Callable[..., str]) -> Callable[..., str]:
    return lambda *values: shown(*values).replace("-", "−")


def _curve(ours: Side, theirs: Side, width: float = 1000.0, height: float = 120.0) -> dict[str, Any]:
    """Differences of the combined score, from the worst loss to the greatest win, as points of two SVG polygons."""
    difference = sorted(a - b for a, b in zip(ours.combined, theirs.combined, strict=True))
    most = max(abs(difference[0]), abs(difference[-1])) or 1.0
    step = width / len(difference)

    def area(sign: int) -> str:
        points = [f"0,{height / 2:.1f}"]
        for i, value in enumerate(difference):
            y = height / 2 * (1 - max(0.0, value * sign) * sign / most)
            points += [f"{i * step:.1f},{y:.1f}", f"{(i + 1) * step:.1f},{y:.1f}"]
        return " ".join([*points, f"{width:.1f},{height / 2:.1f}"])

    return {"win": area(1), "loss": area(-1), "least": difference[0], "most": difference[-1]}


def _whisker(one: Mapping[str, Any], width: float = 180.0, edge: float = 6.0) -> dict[str, float]:
    """Where the rate and its interval lie on an axis from -100 % to 100 %, in pixels."""

    def x(rate: float) -> float:
        return round(edge + (rate + 1) / 2 * (width - 2 * edge), 1)

    low, high = one["interval"] or (one["rate"], one["rate"])
    return {"low": x(low), "at": x(one["rate"]), "high": x(high)}


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def percent(rate: float) -> str:
    """A rate with its sign, in percent."""
    return f"{rate * 100:+.1f} %"


def span(interval: Sequence[float] | None) -> str:
    """An interval of rates in percent."""
    return "(no interval)" if interval is None else f"[{interval[0] * 100:+.1f}, {interval[1] * 100:+.1f}]"


def number(value: float | None, digits: int = 4) -> str:
    """A figure to so many digits; a dash for none."""
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.{digits}g}"
