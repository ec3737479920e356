"""Running a quantized model: text generation, and what can run here."""

from .environment import Environment, env
from .generation import Generation, continue_prompt, generate
from .inspection import Inspection, inspect

__all__ = ["Environment", "Generation", "Inspection", "continue_prompt", "env", "generate", "inspect"]
