"""One model, every precision: quantize once into nested bit-planes, run at any number of bits.

    bitstrata.quantize("path/to/model", "out", bits="2-4", calibration="text.txt")
    model = bitstrata.load("out", bits=4)
    model.generate(**inputs, bits=2)

Importing bitstrata registers its checkpoints with transformers, so
`AutoModelForCausalLM.from_pretrained("out")` works too. All else is imported when it is first used.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .allocation import PlanReport, plan
    from .benchmark import Bench, bench
    from .demonstration import Demo, demo
    from .errors import BitstrataError
    from .evaluation import Evaluation, evaluate
    from .evaluation import evaluate as eval
    from .nn import use_bits
    from .options import (
        BenchOptions,
        EvaluateOptions,
        GenerationSettings,
        PlanOptions,
        QuantizeOptions,
    )
    from .plans import Plan, Resized, layers, load, resize
    from .quantization import Report, quantize
    from .runtime import (
        Conversation,
        Engine,
        Environment,
        Generation,
        Inspection,
        Request,
        env,
        generate,
        inspect,
    )

_ROOMS = {
    "allocation": ("PlanReport", "plan"),
    "benchmark": ("Bench", "bench"),
    "demonstration": ("Demo", "demo"),
    "errors": ("BitstrataError",),
    "evaluation": ("Evaluation", "evaluate"),
    "nn": ("use_bits",),
    "options": ("BenchOptions", "EvaluateOptions", "GenerationSettings", "PlanOptions", "QuantizeOptions"),
    "plans": ("Plan", "Resized", "layers", "load", "resize"),
    "quantization": ("Report", "quantize"),
    "runtime": (
        "Conversation",
        "Engine",
        "Environment",
        "Generation",
        "Inspection",
        "Request",
        "env",
        "generate",
        "inspect",
    ),
}
_HOMES = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = [
    "Bench",
    "BenchOptions",
    "BitstrataError",
    "Conversation",
    "Demo",
    "Engine",
    "Environment",
    "EvaluateOptions",
    "Evaluation",
    "Generation",
    "GenerationSettings",
    "Inspection",
    "Plan",
    "PlanOptions",
    "PlanReport",
    "QuantizeOptions",
    "Report",
    "Request",
    "Resized",
    "__version__",
    "bench",
    "demo",
    "env",
    "eval",
    "evaluate",
    "generate",
    "inspect",
    "layers",
    "load",
    "plan",
    "quantize",
    "resize",
    "use_bits",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get("evaluate" if name == "eval" else name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f".{home}", __name__), "evaluate" if name == "eval" else name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _is_program() -> bool:
    """Whether this process is the program `bitstrata`: its verbs import what they use, its help needs no torch."""
    name = sys.argv[0].replace("\\", "/").rpartition("/")[2] if sys.argv else ""
    return name in ("bitstrata", "bitstrata.exe") or "bitstrata.cli.main" in sys.orig_argv


if not _is_program():
    importlib.import_module(".models", __name__)  # registers with transformers
