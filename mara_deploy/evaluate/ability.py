"""What alignment costs: tasks of lm-eval, and the preference rate, over thresholds of the agents.

At each threshold everything is decoded anew: a verdict that another threshold turns changes all that comes after it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mara_deploy.evaluate.answers import BundleAnswers
from mara_deploy.evaluate.compare import Preference
from mara_runtime.config import DecodeConfig
from mara_runtime.decoder import AlignedDecoder
from mara_runtime.errors import OptionError


@dataclass(frozen=True)
class Point:
    """The LLM alone, or the bundle at one threshold."""

    threshold: float | None
    """None: the LLM alone, greedy"""
    preference: Preference | None
    """against the first baseline, by the combined score; None for the LLM alone"""
    tasks: dict[str, float]
    """{task and metric: its value}; empty without tasks"""
    errors: dict[str, float]
    """standard errors of those that have one"""


class Tasks:
    """Tasks of lm-eval that bundles answer, aligned or not.

    folder: of task files of one's own, beside lm-eval's tasks; limit: documents of each task, None: all;
    raw: without the chat template. Raises OptionError for an unknown task, and for one that does not generate.
    """

    def __init__(self, names: Sequence[str], folder: Path | None, limit: int | None, raw: bool) -> None:
        from lm_eval.tasks import TaskManager, get_task_dict

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        self._names, self._limit, self._raw = list(names), limit, raw
        if folder is not None and not folder.is_dir():
            raise OptionError(f"--lm-eval-folder is {folder}, which is no folder: pass the one that holds task files")
        place = None if folder is None else str(folder)
        self._manager = TaskManager(include_path=place, include_defaults=False)
        if not set(names) <= set(self._manager.all_tasks):  # of lm-eval itself, which takes seconds to read
            self._manager = TaskManager(include_path=place)
        for name in names:
            try:
                found = get_task_dict([name], self._manager)
            except KeyError:
                raise OptionError(
                    f"--lm-eval is {name!r}, which is no task of lm-eval: `lm-eval ls tasks` lists them; your own are "
                    "found with --lm-eval-folder"
                ) from None
            for task, kind in _kinds(found):
                if kind != "generate_until":
                    raise OptionError(
                        f"--lm-eval is {name!r}, and {task} asks for log-likelihoods, which aligned decoding does not "
                        "have and which are the LLM's own whatever the agent: choose tasks that generate, as gsm8k"
                    )

    def run(
        self, answers: BundleAnswers, decoder: AlignedDecoder, config: DecodeConfig, kept: Path
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Metrics of the tasks, and their standard errors. answers: whose settings are those of `config`.

        kept: folder for answers, which an interrupted evaluation goes on from.
        """
        import lm_eval

        from mara_deploy.evaluate.harness import BundleModel

        settings = json.dumps([answers.settings, self._raw], sort_keys=True)
        kept.mkdir(parents=True, exist_ok=True)
        model = BundleModel(decoder, batch_size=answers.conversations, template=answers.template, **_fields(config))
        os.environ.setdefault("DISABLE_MULTIPROC", "1")  # forks for standard errors would have the engine's locks
        with contextlib.redirect_stdout(sys.stderr):
            found = lm_eval.simple_evaluate(
                model,
                tasks=self._names,
                task_manager=self._manager,
                limit=self._limit,
                apply_chat_template=not self._raw and model.chat_template(True) is not None,
                use_cache=str(kept / hashlib.sha256(settings.encode()).hexdigest()[:16]),
                bootstrap_iters=1000,
                log_samples=False,
            )
        values: dict[str, float] = {}
        errors: dict[str, float] = {}
        for task, metrics in found["results"].items():
            for key, value in metrics.items():
                name, _, filtered = key.partition(",")
                label = f"{task} {name.removesuffix('_stderr')}" + f" ({filtered})" * (filtered not in ("", "none"))
                if isinstance(value, float):
                    (errors if name.endswith("_stderr") else values)[label] = value
        return values, errors


def _kinds(found: Mapping[Any, Any]) -> Iterator[tuple[str, str]]:
    """(task, what it asks models for) of nested groups of tasks."""
    for name, task in found.items():
        yield from _kinds(task) if isinstance(task, Mapping) else [(str(name), str(task.config.output_type))]


def _fields(config: DecodeConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in DecodeConfig.__dataclass_fields__ if name != "stop"}


def at(config: DecodeConfig, threshold: float | None) -> DecodeConfig:
    """The configuration at a threshold; None: of the LLM alone, greedy."""
    if threshold is not None:
        return replace(config, threshold=threshold)
    return replace(config, align=False, agents=None, strategy="top1", order="ranked", fallback=None, threshold=0.0)


def measure(
    decoder: AlignedDecoder,
    config: DecodeConfig,
    thresholds: Sequence[float],
    answers: Callable[[str, DecodeConfig], BundleAnswers],
    compare: Callable[[BundleAnswers], Preference],
    tasks: Tasks | None,
    kept: Path,
    report: Callable[[str], None],
) -> list[Point]:
    """With tasks the LLM alone, then the bundle at the configuration's threshold and at others, in ascending order.

    answers: (name, configuration) → answers of the bundle; compare: their preference rate against a baseline.
    """
    found = []
    for threshold in (*([None] if tasks else []), *sorted({config.threshold, *thresholds})):
        chosen = at(config, threshold)
        name = "aligned" if threshold == config.threshold else f"aligned at {threshold}"
        source = answers(name, chosen)
        preference = None if threshold is None else compare(source)
        metrics: tuple[dict[str, float], dict[str, float]] = {}, {}
        if tasks is not None:
            report("lm-eval, " + ("the LLM alone" if threshold is None else f"aligned at threshold {threshold}"))
            metrics = tasks.run(source, decoder, chosen, kept)
        found.append(Point(threshold, preference, *metrics))
    return found


def trade_off(points: Sequence[Mapping[str, Any]], width: float = 640.0, height: float = 300.0) -> dict[str, Any]:
    """Where points of the plot lie, in pixels: to the right the preference rate, upwards each metric as a share of the
    LLM's alone. The line of a metric goes from threshold to threshold; one that is 0 for the LLM alone has none.
    """
    left, right, top, bottom = 46.0, width - 12.0, 24.0, height - 34.0
    alone, *aligned = points
    shares = {
        label: [point["tasks"][label] / value for point in aligned]
        for label, value in alone["tasks"].items()
        if value > 0
    }
    most: float = max([1.0, *(share for values in shares.values() for share in values)])

    def y(share: float) -> float:
        return round(bottom - share / most * (bottom - top), 1)

    xs = [round(left + (point["preference"]["rate"] + 1) / 2 * (right - left), 1) for point in aligned]
    lines = [
        {
            "label": label,
            "points": [
                {"x": x, "y": y(share), "threshold": point["threshold"]}
                for x, share, point in zip(xs, values, aligned, strict=True)
            ],
        }
        for label, values in shares.items()
    ]
    axes = {"left": left, "right": right, "top": top, "bottom": bottom, "middle": (left + right) / 2, "alone": y(1.0)}
    return {"width": width, "height": height, "lines": lines, **axes}
