"""The report of a training run: plots and examples in one self-contained HTML file."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from mara_deploy.files import write_file
from mara_deploy.html import render_report
from mara_deploy.train.cautions import cautions
from mara_deploy.train.folder import RunFolder
from mara_deploy.train.loop import Row

_INK, _FAINT = "#1f2933", "#9aa5b1"
_COLOURS = ("#1f6feb", "#c2410c")
_PANELS: tuple[tuple[str, dict[str, str]], ...] = (
    ("Score of sampled answers", {"score": ""}),
    ("Reward: score − kl_weight · KL", {"reward": ""}),
    ("KL to the LLM, nats per answer", {"kl": ""}),
    ("Entropy of the policy, nats per state; dotted: target", {"entropy": ""}),
    ("Entropy coefficient α", {"alpha": ""}),
    ("Share of decisions", {"intervention_rate": "not the LLM's best", "forced_rate": "all rejected"}),
    ("Accepted share of examined candidates", {"accept_rate": ""}),
    ("Decisions per token", {"decision_share": ""}),
    ("Answer length, tokens", {"answer_tokens": ""}),
    ("Critic loss", {"critic_loss": ""}),
    ("Mean n-step return", {"return": ""}),
    ("Seconds per round", {"rollout_seconds": "rollouts", "update_seconds": "updates"}),
)
"""(title, {metric: label}), three to a row."""
_EXAMPLES = 3
"""Shown from the first and from the last rounds, each."""


def write_report(folder: RunFolder) -> None:
    """Write report.html from run.json and the log, unless the run has no rounds yet."""
    rows, run = folder.rows(), folder.run()
    if not rows:
        return
    first, last = ([row["example"] for row in part] for part in (rows[:_EXAMPLES], rows[-_EXAMPLES:]))
    values = {
        "run": run,
        "last": rows[-1],
        "cautions": cautions(rows, run["config"]),
        "plots": Markup(plots(rows, run["config"])),
        "examples": {"First rounds": first, "Last rounds": last},
    }
    write_file(folder.path / "report.html", render_report("mara_deploy.train", values, {}))


def plots(rows: Sequence[Row], config: dict[str, Any]) -> str:
    """Small multiples of the metrics over episodes, as SVG."""
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
        for axes, (title, lines) in zip(figure.subplots(4, 3, sharex=True).flat, _PANELS, strict=True):
            _draw(axes, rows, title, lines)
            if "entropy" in lines:
                axes.axhline(config["target_entropy"] * math.log(2), color=_INK, linewidth=1, linestyle=":")
        figure.supxlabel("episodes", fontsize=9)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    return "<svg" + out.getvalue().partition("<svg")[2]  # without the XML declaration


def _draw(axes: Any, rows: Sequence[Row], title: str, lines: dict[str, str]) -> None:
    """One panel: rounds faint, their moving average on top."""
    axes.set_title(title)
    for (name, label), colour in zip(lines.items(), _COLOURS, strict=False):
        points = [(row["episodes"], row[name]) for row in rows if name in row]
        if not points:
            axes.text(0.5, 0.5, "no updates yet", transform=axes.transAxes, ha="center", color=_FAINT)
            continue
        x, y = (np.array(column, float) for column in zip(*points, strict=True))
        axes.plot(x, y, color=colour, alpha=0.25, linewidth=1, marker="." if len(x) < 3 else None)
        axes.plot(x, _smooth(y), color=colour, linewidth=1.8, label=label)
    if len(lines) > 1:
        axes.legend(frameon=False, fontsize=8)


def _smooth(y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Moving average over a tenth of the run, less at its ends."""
    half = max(1, len(y) // 20)
    sums = np.concatenate([[0.0], y.cumsum()])
    low = np.maximum(np.arange(len(y)) - half, 0)
    high = np.minimum(np.arange(len(y)) + half + 1, len(y))
    smooth: NDArray[np.float64] = (sums[high] - sums[low]) / (high - low)
    return smooth
