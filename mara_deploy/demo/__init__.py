"""The embedded demo: a small LM trained on generated text, to try everything without a download."""

from pathlib import Path

MODEL_FOLDER = Path(__file__).parent / "model"
"""The demo's LM as a Hugging Face folder, made by `python -m mara_deploy.demo.train`."""
AGENT_SEED = 10
AGENT_WIDTHS = (256, 128)
"""The demo's agent is untrained for now: random weights from a seed. Of seeds 0 to 11 this one does most of both:
it accepts two thirds of the LLM's first choices and rejects the others."""
