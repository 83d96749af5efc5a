"""The front door: commands, the agent and its training, evaluation, the embedded demo."""
