"""Scores by name: a Python function, a Hugging Face model, or the demo's."""

from __future__ import annotations

import importlib
import sys
import sysconfig
import traceback
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mara_deploy import demo
from mara_deploy.scores.base import ScoreError, shown
from mara_runtime.bundle import sha256
from mara_runtime.errors import MaraError

if TYPE_CHECKING:
    from mara_deploy.scores.reward_model import RewardModel


def load_score(
    spec: str, *, template: str | None = None, device: str = "cpu", batch_size: int = 8
) -> FunctionScore | RewardModel:
    """Load a score.

    spec: `demo`; `module:function`, also importable from the working directory; or the folder or Hub id of a Hugging
    Face sequence-classification or reward model, followed by `#LABEL` if it has several labels.
    template, device, batch_size: for a model, see `mara_deploy.scores.reward_model.RewardModel`.
    Raises ScoreError, or OptionError for the device.
    """
    if spec == demo.NAME:
        spec = demo.SCORE
    if is_function(spec):
        if template is not None:
            raise ScoreError(f"--score-template applies to models only; the score {spec} is a Python function")
        return _import_function(spec)
    try:
        from mara_deploy.scores.reward_model import RewardModel
    except ImportError as error:
        raise ScoreError(
            f"the score {spec} is a model, which requires packages that are not installed ({error}): pip install "
            "'mara-deploy[train]', or pass a Python function (module:function)"
        ) from None
    return RewardModel(spec, template, device, batch_size)


def is_function(spec: str) -> bool:
    """Whether a score is Python code rather than a model."""
    module, colon, function = spec.partition(":")
    return spec == demo.NAME or (colon == ":" and all(part.isidentifier() for part in (*module.split("."), function)))


class FunctionScore:
    """A Python callable (prompts, answers) → floats. fingerprint: of its code."""

    def __init__(
        self,
        name: str,
        function: Callable[[Sequence[str], Sequence[str]], Sequence[float]],
        fingerprint: str = "unknown",
    ) -> None:
        self.name, self.fingerprint = name, fingerprint
        self._function = function

    def __call__(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Any]:
        """What the function returns, as a list. Raises ScoreError of one line for whatever it raises."""
        returned = self._guarded(lambda: self._function(list(prompts), list(answers)))
        try:
            if isinstance(returned, (str, bytes, Mapping, Set)):
                raise TypeError
            iterator = iter(returned)
        except TypeError:
            raise ScoreError(
                f"the score {self.name} returned {shown(returned)}; it must return a list with one number per answer"
            ) from None
        values: list[Any] = self._guarded(lambda: list(iterator))
        return values

    def _guarded(self, call: Callable[[], Any]) -> Any:
        """Run the user's code. Raises ScoreError, which names the line that failed."""
        try:
            return call()
        except MaraError:
            raise
        except Exception as error:
            raise ScoreError(f"the score {self.name} failed with {_describe(error)}") from error


def _import_function(spec: str) -> FunctionScore:
    module_name, _, name = spec.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:  # console scripts leave it out
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's module can raise anything
        raise ScoreError(f"the score {spec} cannot be loaded: {_describe(error)}") from error
    if not hasattr(module, name):
        raise ScoreError(f"the score {spec} cannot be loaded: {module_name} has no function {name!r}")
    function = getattr(module, name)
    if not callable(function):
        raise ScoreError(
            f"the score {spec} cannot be loaded: {name!r} in {module_name} is of type {type(function).__name__}, not a "
            "function of prompts and answers"
        )
    file = getattr(module, "__file__", None)
    return FunctionScore(spec, function, sha256(Path(file))[:16] if file else "built in")


def _describe(error: BaseException) -> str:
    """Type, message and location of an error in the user's code: its innermost line outside Python, packages and
    this file."""
    paths = sysconfig.get_paths()
    ours = (*(paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")), __file__, "<")
    theirs = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(ours)]
    location = ""
    if theirs:
        file = Path(theirs[-1].filename)
        name = file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file
        location = f" ({name}:{theirs[-1].lineno})"
    return f"{type(error).__name__}: {error}{location}"
