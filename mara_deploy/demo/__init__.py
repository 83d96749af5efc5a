"""The embedded demo: a small LM and the agent trained for it, to try everything without a download."""

from pathlib import Path

MODEL_FOLDER = Path(__file__).parent / "model"
"""The demo's LM as a Hugging Face folder, made by `python -m mara_deploy.demo.train`."""
AGENT_FILE = Path(__file__).parent / "agent" / "agent.safetensors"
"""The demo's agent, made by `mara-train --model demo --prompts demo --score demo`; run.json beside it says how."""
