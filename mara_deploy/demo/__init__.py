"""The embedded demo: a small LM and the agent trained for it. Everything that the name `demo` stands for is here.

examples/demo_lm trains the LM; run.json in the agent's folder records how the agent was trained.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mara_deploy.agent import Agent
    from mara_export.hf.sources import ModelSource
    from mara_runtime.bundle import Bundle

NAME = "demo"
"""Names the model, the agent, the prompts, the score and the training recipe; in bundles, model and agent."""
MODEL_FOLDER = Path(__file__).parent / "model"
"""The LM as a Hugging Face folder."""
AGENT_FILE = Path(__file__).parent / "agent" / "agent.safetensors"
SCORE = "mara_deploy.demo.score:considerate"
"""The score as module:function."""


def demo_model() -> ModelSource:
    """The LM."""
    from mara_export.hf.sources import ModelSource

    return ModelSource(MODEL_FOLDER, NAME, None)


def demo_agent() -> Agent:
    """The trained agent."""
    from mara_deploy.agent import load

    return load(AGENT_FILE)


def export_demo(out: Path, quiet: bool = False, **options: Any) -> Bundle:
    """Export LM and agent to `out`. options: of `mara_export.options.ExportOptions`."""
    from mara_export.agents import NamedAgent
    from mara_export.export import export
    from mara_export.options import ExportOptions
    from mara_export.progress import Progress

    return export(demo_model(), [NamedAgent(NAME, NAME, demo_agent())], out, ExportOptions(**options), Progress(quiet))
