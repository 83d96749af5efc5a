"""The agents of the TensorRT engine: the weights of those in use, in device memory that stays where it is.

Contexts and CUDA graphs refer to its addresses. Agents that change are copied to the same place, so graphs stay valid,
and no engine file is opened again; another number of agents is another shape of pass.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mara_runtime.agents import AgentStack
from mara_runtime.bundle import Bundle
from mara_runtime.engines.cuda import Cuda
from mara_runtime.engines.io_block import Sizes, layout
from mara_runtime.errors import EngineError
from mara_runtime.tensors import agent_weights


class DeviceAgents:
    """Room for as many agents as an engine takes, of the widths that it was built for."""

    def __init__(self, cuda: Cuda, bundle: Bundle, target: str, largest: Sizes) -> None:
        """target: of the bundle's engines. largest: sizes of the largest pass. Raises EngineError."""
        self._cuda, self._bundle, self._target, self._largest = cuda, bundle, target, largest
        self._agents = AgentStack(bundle, largest.widths)
        self.count = 1
        """A of the passes that follow"""
        self._offsets, self.size_bytes = layout(agent_weights(bundle.manifest.model.shape.hidden_size), largest)
        self._device = cuda.allocate(self.size_bytes, "the agents")

    def addresses(self) -> dict[str, int]:
        """Address of each tensor on the device."""
        return {name: self._device + offset for name, offset in self._offsets.items()}

    def use(self, names: Sequence[str]) -> None:
        """See `Engine.use`."""
        most, widths = self._largest.agents, self._largest.widths
        if len(names) > most:
            raise EngineError(f"{len(names)} agents are more than the {most} that the engine takes: use fewer at once")
        for name in names:
            wanted = self._bundle.manifest.agent(name).widths
            if any(width > room for width, room in zip(wanted, widths, strict=True)):
                raise EngineError(
                    f"the agent {name} has hidden widths {wanted}, and the engine was built for {widths}: build it "
                    f"again with mara-build {shlex.quote(str(self._bundle.folder))} --target {self._target}"
                )
        self._agents.use(names, self._load)

    def _load(self, stacked: list[NDArray[np.float32]]) -> None:
        """Copy the weights to the device, behind whatever still runs there, and wait."""
        self.count = len(stacked[0])
        parts = [weights.reshape(-1).view(np.uint8) for weights in stacked]
        host = self._cuda.allocate_host(sum(part.nbytes for part in parts))  # for the copy alone: it is as large
        try:
            start = 0
            for part, offset in zip(parts, self._offsets.values(), strict=True):
                source = host[start : start + part.nbytes]
                source[:] = part
                self._cuda.upload(self._device + offset, source)
                start += part.nbytes
        finally:
            self._cuda.wait()
            self._cuda.free_host(host)

    def close(self) -> None:
        """Free the memory."""
        self._cuda.free(self._device)
