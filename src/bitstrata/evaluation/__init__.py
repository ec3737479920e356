"""How far a quantized model is from the original: loss, divergence, agreement, per bits."""

from .report import BitsResult, Evaluation
from .run import evaluate

__all__ = ["BitsResult", "Evaluation", "evaluate"]
