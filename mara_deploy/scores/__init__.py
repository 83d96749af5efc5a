"""Scores: the value of an answer to a prompt."""
