"""How far a quantized model is from the original: loss, divergence, agreement, per bits."""

from .perplexity import evaluate
from .report import BitsResult, Evaluation

__all__ = ["BitsResult", "Evaluation", "evaluate"]
