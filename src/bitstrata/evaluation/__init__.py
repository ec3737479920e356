"""How far a quantized model is from the original: loss, divergence, agreement, per bits."""

from .divergence import Measured, Tally
from .perplexity import evaluate, load_reference
from .report import BitsResult, Evaluation

__all__ = ["BitsResult", "Evaluation", "Measured", "Tally", "evaluate", "load_reference"]
