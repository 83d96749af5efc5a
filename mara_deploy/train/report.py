"""The report of a training run: plots and examples, one HTML file that needs nothing else."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from numpy.typing import NDArray

from mara_deploy.train.cautions import cautions
from mara_deploy.train.folder import RunFolder
from mara_deploy.train.loop import Row

_INK, _FAINT, _ACCENT, _SECOND, _THIRD = "#1f2933", "#9aa5b1", "#1f6feb", "#c2410c", "#2f855a"
_EXAMPLES = 3
"""Shown from the beginning and from the end, each."""


def write_report(folder: RunFolder) -> None:
    """Write report.html from run.json and the log. A run without a round has no report."""
    rows, run = folder.rows(), folder.run
    if not rows:
        return
    templates = Environment(loader=PackageLoader("mara_deploy.train"), autoescape=True, trim_blocks=True)
    beginning, end = ([row["example"] for row in part] for part in (rows[:_EXAMPLES], rows[-_EXAMPLES:]))
    page = templates.get_template("report.html.jinja").render(
        run=run,
        last=rows[-1],
        cautions=cautions(rows, run["config"]),
        plots=Markup(plots(rows, run["config"])),
        beginning=beginning,
        end=end,
    )
    folder.write_report(page)


def plots(rows: Sequence[Row], config: dict[str, Any]) -> str:
    """Small multiples over episodes, as SVG."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": _FAINT,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "text.color": _INK,
        "axes.labelcolor": _INK,
        "xtick.color": _FAINT,
        "ytick.color": _FAINT,
        "xtick.labelcolor": _INK,
        "ytick.labelcolor": _INK,
        "svg.fonttype": "path",
        "svg.hashsalt": "mara",
        "axes.grid": True,
        "grid.color": "#eef1f4",
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(11, 9.5), layout="constrained")
        axes = iter(figure.subplots(4, 3, sharex=True).flat)
        panel = _Panel(rows)
        panel.draw(next(axes), "Score of sampled answers", {"score": ""})
        panel.draw(next(axes), "Reward: score − price of the KL", {"reward": ""})
        panel.draw(next(axes), "KL from the LLM, nats per answer", {"kl": ""})
        target = config["target_entropy"] * math.log(2)
        panel.draw(next(axes), "Entropy of the policy, nats per state", {"entropy": ""}, (target, "target"))
        panel.draw(next(axes), "Entropy temperature α", {"alpha": ""})
        rates = {"intervention_rate": "not the LLM's best", "forced_rate": "all rejected"}
        panel.draw(next(axes), "Share of decisions", rates)
        panel.draw(next(axes), "Accepted, share of examined candidates", {"accept_rate": ""})
        panel.draw(next(axes), "Decisions, share of tokens", {"decision_share": ""})
        panel.draw(next(axes), "Length of answers, tokens", {"answer_tokens": ""})
        panel.draw(next(axes), "Loss of the critics", {"critic_loss": ""})
        panel.draw(next(axes), "Mean n-step return of a batch", {"return": ""})
        panel.draw(next(axes), "Seconds per round", {"rollout_seconds": "rollouts", "update_seconds": "updates"})
        figure.supxlabel("episodes", fontsize=9)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    return "<svg" + out.getvalue().partition("<svg")[2]  # without the XML declaration


class _Panel:
    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    def draw(self, axes: Any, title: str, lines: dict[str, str], level: tuple[float, str] | None = None) -> None:
        """One plot: the rounds faint, their moving average on top."""
        axes.set_title(title)
        for (name, label), colour in zip(lines.items(), (_ACCENT, _SECOND, _THIRD), strict=False):
            points = [(row["episodes"], row[name]) for row in self._rows if name in row]
            if not points:
                axes.text(0.5, 0.5, "nothing learned yet", transform=axes.transAxes, ha="center", color=_FAINT)
                continue
            x, y = (np.array(column, float) for column in zip(*points, strict=True))
            axes.plot(x, y, color=colour, alpha=0.25, linewidth=1, marker="." if len(x) < 3 else None)
            axes.plot(x, _smooth(y), color=colour, linewidth=1.8, label=label or None)
        if level is not None:
            axes.axhline(level[0], color=_INK, linewidth=1, linestyle=":", label=level[1])
        if any(lines.values()) or level is not None:
            axes.legend(frameon=False, fontsize=8)


def _smooth(y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Moving average over a tenth of the run, shorter at the ends."""
    half = max(1, len(y) // 20)
    sums = np.concatenate([[0.0], y.cumsum()])
    low = np.maximum(np.arange(len(y)) - half, 0)
    high = np.minimum(np.arange(len(y)) + half + 1, len(y))
    smooth: NDArray[np.float64] = (sums[high] - sums[low]) / (high - low)
    return smooth
