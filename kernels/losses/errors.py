"""What a loss refuses. Every type is a ``ValueError``; messages say what was given, what is allowed and what to do."""

from __future__ import annotations


class LossInputError(ValueError):
    """The base of everything a loss refuses."""


class ShapeMismatch(LossInputError):
    """Student and teacher (or labels) do not fit each other, for instance because their class counts differ."""


class InvalidTemperature(LossInputError):
    """A temperature is zero, negative or not finite."""


class NonFiniteInput(LossInputError):
    """Logits or embeddings hold NaN or infinity."""


class BatchTooSmall(LossInputError):
    """A loss over pairs of samples got fewer than two samples."""
