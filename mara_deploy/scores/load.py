"""Scores by name: a Python function, a Hugging Face model, or the demo's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mara_deploy import demo
from mara_deploy.scores.base import ScoreError, foreign
from mara_deploy.scores.function import FunctionScore, IsolatedScore
from mara_runtime.bundle import sha256

if TYPE_CHECKING:
    from mara_deploy.scores.reward_model import RewardModel


def load_score(
    spec: str, *, template: str | None = None, device: str = "cpu", batch_size: int = 8
) -> FunctionScore | IsolatedScore | RewardModel:
    """Load a score.

    spec: `demo`; `module:function`, also of the working directory, or `file.py:function`; or the folder or Hub id of a
    Hugging Face sequence-classification or reward model, followed by `#LABEL` if it has several labels.
    template, device, batch_size: for a model, see `mara_deploy.scores.reward_model.RewardModel`.
    Raises ScoreError, or OptionError for the device.
    """
    if is_function(spec):
        if template is not None:
            raise ScoreError(f"--score-template applies to models only; the score {spec} is a Python function")
        if spec == demo.NAME:
            from mara_deploy.demo import score

            return FunctionScore(demo.SCORE, score.considerate, sha256(Path(score.__file__))[:16])
        if not spec.rpartition(":")[2].isidentifier() or ":" not in spec:
            raise ScoreError(f"the score {spec} names no function: write {spec.rstrip(':')}:FUNCTION")
        return IsolatedScore(spec)
    try:
        from mara_deploy.scores.reward_model import RewardModel
    except ImportError as error:
        raise ScoreError(
            f"the score {spec} is a model, which requires packages that are not installed ({error}): pip install "
            "'mara-deploy[train]', or pass a Python function (module:function)"
        ) from None
    with foreign(spec):
        return RewardModel(spec, template, device, batch_size)


def is_function(spec: str) -> bool:
    """Whether a score is Python code rather than a model."""
    module, colon, _ = spec.rpartition(":")
    if spec == demo.NAME or spec.endswith(".py") or module.endswith(".py"):
        return True
    return colon == ":" and all(part.isidentifier() for part in module.split("."))
