"""The front door: commands, agents and their training, evaluation, the embedded demo."""
