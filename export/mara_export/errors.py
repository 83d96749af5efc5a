"""Errors of an export that the user can correct."""

from __future__ import annotations

from mara_runtime.errors import MaraError


class ModelError(MaraError):
    """A model that is missing, damaged, or of a kind that is not supported."""


class ParityError(MaraError):
    """The exported graphs do not compute what the model computes in PyTorch."""
