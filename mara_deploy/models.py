"""Models and agents by the names that commands take: demo, an alias, a Hub id, a path."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mara_deploy import demo
from mara_runtime.errors import MaraError, OptionError
from mara_runtime.manifest import is_agent_name

if TYPE_CHECKING:
    from mara_deploy.agent import Agent
    from mara_export.agents import NamedAgent
    from mara_export.hf.sources import ModelSource

MODEL_HELP = "demo, an alias (qwen2, llama3.2-1b, …), a Hub id, or a folder"
LORA_HELP = "LoRA adapter (PEFT) to merge into the model, a Hub id or a folder"


def find_model(
    name: str, vet: Callable[[ModelSource], object] | None = None, revision: str | None = None
) -> ModelSource:
    """The model of that name. vet, revision: as of `mara_export.hf.sources.resolve_model`. Raises ModelError."""
    from mara_export.hf.sources import resolve_model

    return demo.demo_model() if name == demo.NAME else resolve_model(name, vet, revision)


def find_adapter(name: str, revision: str | None = None) -> ModelSource:
    """The LoRA adapter of that name. revision: as of `mara_export.hf.sources.resolve_adapter`. Raises ModelError."""
    from mara_export.hf.sources import resolve_adapter

    return resolve_adapter(name, revision)


def find_agent(name: str, model: str) -> tuple[Agent, str]:
    """The agent of that name, and its source for the manifest, which is never a path of this machine.

    name: demo, a file, or HUB_ID:FILE; model: the name of the model it goes with. Raises MaraError.
    """
    from mara_deploy import agent as agents
    from mara_export.hf.sources import is_hub_id, local_path, resolve_file

    if name == demo.NAME:
        if model != demo.NAME:
            raise MaraError(
                f"the agent demo works only with the model demo, not with {Path(model).name}: name an agent file"
            )
        return demo.demo_agent(), demo.NAME
    path = local_path(name)
    hub_id, colon, file = name.partition(":")
    if path is None and colon and is_hub_id(hub_id):
        return agents.load(resolve_file(hub_id, file)), name
    path = path or Path(name)
    return agents.load(path), path.name


def named_agent(name: str, model: str, called: str | None = None) -> NamedAgent:
    """As `find_agent`, called so; by default by NAME= before it, or else by its file's name. Raises MaraError."""
    from mara_export.agents import NamedAgent
    from mara_export.hf.sources import local_path

    before, sign, rest = name.partition("=")
    if not (sign and is_agent_name(before)) or local_path(name) is not None:
        before, rest = "", name
    agent, source = find_agent(rest, model)
    return NamedAgent(called or before or _name_of(source.rpartition(":")[2]), source, agent)


def named_agents(names: Sequence[str], model: str) -> list[NamedAgent]:
    """Several agents. Raises MaraError, also for two that are called the same."""
    found = [named_agent(name, model) for name in names]
    called = [each.name for each in found]
    if twice := next((name for name in called if called.count(name) > 1), None):
        raise OptionError(f"two agents are called {twice}: give them names, as in --agent polite=FILE")
    return found


def _name_of(file: str) -> str:
    """What an agent is called by default: its file's name, of which an agent's name may have all letters."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(file).stem).lstrip("._-")[:64]
    return name or "agent"
