"""Evaluation: preference rate of an aligned bundle against baselines, on prompts, by scores."""
