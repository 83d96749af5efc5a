"""Models and agents by the names that commands take: demo, an alias, a Hub id, a path."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mara_deploy import demo
from mara_runtime.errors import MaraError

if TYPE_CHECKING:
    from mara_deploy.agent import Agent
    from mara_export.hf.sources import ModelSource

MODEL_HELP = "demo, an alias (qwen2, llama3.2-1b, …), a Hub id, or a folder"


def find_model(
    name: str, vet: Callable[[ModelSource], object] | None = None, revision: str | None = None
) -> ModelSource:
    """The model of that name. vet, revision: as of `mara_export.hf.sources.resolve_model`. Raises ModelError."""
    from mara_export.hf.sources import resolve_model

    return demo.demo_model() if name == demo.NAME else resolve_model(name, vet, revision)


def find_agent(name: str, model: str) -> tuple[Agent, str]:
    """The agent of that name, and its name for the manifest, which is never a path of this machine.

    name: demo, a file, or HUB_ID:FILE; model: the name of the model it goes with. Raises MaraError.
    """
    from mara_deploy import agent as agents
    from mara_export.hf.sources import is_hub_id, local_path, resolve_file

    if name == demo.NAME:
        if model != demo.NAME:
            raise MaraError(
                f"--agent is demo, which works only with --model demo, not with {Path(model).name}: name an agent file"
            )
        return demo.demo_agent(), demo.NAME
    path = local_path(name)
    hub_id, colon, file = name.partition(":")
    if path is None and colon and is_hub_id(hub_id):
        return agents.load(resolve_file(hub_id, file)), name
    path = path or Path(name)
    return agents.load(path), path.name
