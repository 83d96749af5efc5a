"""The result of an evaluation as JSON, as an HTML page and as lines for the terminal, with the same figures."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from mara_deploy.evaluate.ability import trade_off
from mara_deploy.evaluate.cautions import cautions, counted
from mara_deploy.evaluate.compare import Bootstrap, unit_numbers
from mara_deploy.evaluate.evaluate import Evaluation, ScoredAnswers


def result(evaluation: Evaluation, facts: Mapping[str, Any], bootstrap: Bootstrap) -> dict[str, Any]:
    """All figures as plain JSON values. facts: what the command adds about bundle, prompts and settings."""
    units = int(unit_numbers([prompt.group for prompt in evaluation.prompts]).max()) + 1
    unit = "prompt" if evaluation.prompts[0].group is None else "group"
    return {
        "trade_off": [],
        **facts,
        "scores": evaluation.weights,
        "bootstrap": {"unit": unit, "units": units, **asdict(bootstrap)},
        "in_training": [prompt.text for prompt in evaluation.prompts if prompt.text in evaluation.seen],
        "sides": {
            side.name: {"text": asdict(side.text), "counters": side.counters}
            for side in (evaluation.aligned, *evaluation.baselines.values())
        },
        "comparisons": {name: asdict(comparison) for name, comparison in evaluation.comparisons.items()},
        "cautions": list(cautions(evaluation, units, unit, facts.get("decoding", {}))),
    }


def lines(summary: Mapping[str, Any]) -> list[str]:
    """A `result` in a few lines for the terminal."""
    bootstrap, prompts, scores = summary["bootstrap"], summary["prompts"], summary["scores"]
    out = [
        f"{prompts['file']}: {counted(prompts['unique'], 'prompt')}, {counted(prompts['duplicates'], 'duplicate')} "
        f"dropped; {bootstrap['level']:.0%} intervals over {counted(bootstrap['units'], bootstrap['unit'])}"
    ]
    width = max(8, *map(len, scores))
    for name, comparison in summary["comparisons"].items():
        out.append(f"aligned against {name}:")
        rows = [("combined", comparison["combined"])]
        if len(scores) > 1:
            rows += comparison["each"].items()
        if comparison["unseen"]:
            rows.append(("unseen", comparison["unseen"]))
        out += [
            f"  {label:<{width}}  {percent(row['rate']):>8} {span(row['interval']):<20} "
            f"wins {row['wins']}, ties {row['ties']}, losses {row['losses']}; "
            f"mean {row['mean']:.4g} against {row['baseline_mean']:.4g}"
            for label, row in rows
        ]
    if summary["trade_off"]:
        out += trade_off_lines(summary["trade_off"], next(iter(summary["comparisons"])))
    return out + [f"note: {caution}" for caution in summary["cautions"]]


def trade_off_lines(points: Sequence[Mapping[str, Any]], baseline: str) -> list[str]:
    """Preference rate and tasks by threshold: a table for the terminal. points: of `result`."""
    rows = [["threshold", f"against {baseline}", *points[0]["tasks"]]]
    for point in points:
        preference, errors = point["preference"], point["errors"]
        rate = "–" if preference is None else f"{percent(preference['rate'])} {span(preference['interval'])}"
        rows.append(
            [
                "LLM alone" if point["threshold"] is None else f"{point['threshold']:g}",
                rate,
                *(
                    number(value) + (f" ± {number(errors[label], 2)}" if label in errors else "")
                    for label, value in point["tasks"].items()
                ),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["what alignment costs:"] + [
        "  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows
    ]


def html(evaluation: Evaluation, summary: Mapping[str, Any], count: int) -> str:
    """A self-contained page, without scripts or external files. summary: the `result`; count: examples of each kind."""
    from mara_deploy.html import render_report

    values = {
        "summary": summary,
        "examples": {name: examples(evaluation, name, count) for name in evaluation.baselines},
        "curves": {name: difference_curve(evaluation.aligned, side) for name, side in evaluation.baselines.items()},
        "whisker": whisker,
        "trade_off": trade_off,
    }
    filters = {f.__name__: _with_minus_signs(f) for f in (percent, span, number)}
    return render_report("mara_deploy.evaluate", values, filters)


def examples(evaluation: Evaluation, name: str, count: int) -> list[dict[str, Any]]:
    """Prompts with both answers: the worst losses, the greatest wins, and a random selection, `count` of each."""
    ours, theirs = evaluation.aligned, evaluation.baselines[name]
    difference = [a - b for a, b in zip(ours.combined, theirs.combined, strict=True)]
    ranked = sorted(range(len(difference)), key=lambda i: (difference[i], i))
    worst = [i for i in ranked[:count] if difference[i] < 0]
    best = [i for i in ranked[::-1][:count] if difference[i] > 0]
    rest = [i for i in range(len(difference)) if i not in {*worst, *best}]
    sampled = sorted(random.Random(0).sample(rest, min(count, len(rest))))
    kinds = {"Worst losses": worst, "Greatest wins": best, "Random selection of the rest": sampled}
    return [
        {"title": title, "items": [_example(evaluation, theirs, i) for i in indices]}
        for title, indices in kinds.items()
        if indices
    ]


def _example(evaluation: Evaluation, theirs: ScoredAnswers, i: int) -> dict[str, Any]:
    prompt = evaluation.prompts[i]
    return {
        "prompt": prompt.text,
        "seen": prompt.text in evaluation.seen,
        "sides": [
            {
                "name": side.name,
                "text": side.answers[i].text,
                "tokens": side.answers[i].tokens,
                "truncated": side.answers[i].finish_reason == "length",
                "combined": side.combined[i],
                "each": {name: values[i] for name, values in side.each.items()},
                "stats": side.answers[i].stats,
            }
            for side in (evaluation.aligned, theirs)
        ],
    }


def difference_curve(
    ours: ScoredAnswers, theirs: ScoredAnswers, width: float = 1000.0, height: float = 120.0
) -> dict[str, Any]:
    """Sorted differences of the combined score as two SVG polygons, losses and wins, with the extreme values."""
    difference = sorted(a - b for a, b in zip(ours.combined, theirs.combined, strict=True))
    scale = max(abs(difference[0]), abs(difference[-1])) or 1.0
    step = width / len(difference)

    def area(sign: int) -> str:
        points = [f"0,{height / 2:.1f}"]
        for i, value in enumerate(difference):
            y = height / 2 * (1 - max(0.0, value * sign) * sign / scale)
            points += [f"{i * step:.1f},{y:.1f}", f"{(i + 1) * step:.1f},{y:.1f}"]
        return " ".join([*points, f"{width:.1f},{height / 2:.1f}"])

    return {"win": area(1), "loss": area(-1), "min": difference[0], "max": difference[-1]}


def whisker(preference: Mapping[str, Any], width: float = 180.0, edge: float = 6.0) -> dict[str, float]:
    """Positions, in pixels, of a rate and its interval on an axis from -100 % to 100 %."""

    def x(rate: float) -> float:
        return round(edge + (rate + 1) / 2 * (width - 2 * edge), 1)

    low, high = preference["interval"] or (preference["rate"], preference["rate"])
    return {"low": x(low), "at": x(preference["rate"]), "high": x(high)}


def _with_minus_signs(format_: Callable[..., str]) -> Callable[..., str]:
    return lambda *values: format_(*values).replace("-", "−")


def percent(rate: float) -> str:
    """A rate with its sign, in percent."""
    return f"{rate * 100:+.1f} %"


def span(interval: Sequence[float] | None) -> str:
    """An interval of rates, in percent."""
    return "(no interval)" if interval is None else f"[{interval[0] * 100:+.1f}, {interval[1] * 100:+.1f}]"


def number(value: float | None, digits: int = 4) -> str:
    """A figure to so many digits; a dash for None."""
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.{digits}g}"
