"""Who runs a model: an engine or a session, one at a time."""

from __future__ import annotations

from transformers import PreTrainedModel

from ...errors import UsageError

HELD = "_bitstrata_held"  # an attribute of a model that is held


def require_free(model: PreTrainedModel) -> None:
    """Raises UsageError for a model that is held."""
    if HELD in model.__dict__:
        raise UsageError(
            "an engine, or a call to generate, is running this model",
            hint="close it first, or load the model once more",
        )


def hold(model: PreTrainedModel) -> None:
    """Raises UsageError for a model that is held."""
    require_free(model)
    model.__dict__[HELD] = True


def let_go(model: PreTrainedModel) -> None:
    """The model is free, as it may have been before."""
    model.__dict__.pop(HELD, None)
