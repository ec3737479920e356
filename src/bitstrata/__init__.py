"""One model, every precision: quantize once into nested bit-planes, run at any number of bits.

    bitstrata.quantize("path/to/model", "out", bits="2-4", calibration="text.txt")
    model = bitstrata.load("out", bits=4)
    model.generate(**inputs, bits=2)

Importing bitstrata registers its checkpoints with transformers, so
`AutoModelForCausalLM.from_pretrained("out")` works too. All else is imported when it is first used.
"""

import importlib
import sys
import typing

from .version import __version__ as __version__

if typing.TYPE_CHECKING:  # what `_HOMES` says, for editors and type checkers
    from .allocation import PlanReport as PlanReport
    from .allocation import plan as plan
    from .benchmark import Bench as Bench
    from .benchmark import bench as bench
    from .demonstration import Demo as Demo
    from .demonstration import demo as demo
    from .errors import BitstrataError as BitstrataError
    from .evaluation import Evaluation as Evaluation
    from .evaluation import evaluate as eval  # noqa: F401
    from .evaluation import evaluate as evaluate
    from .exchange import Export as Export
    from .exchange import Import as Import
    from .exchange import export_model as export_model
    from .exchange import import_model as import_model
    from .models import BitstrataConfig as BitstrataConfig
    from .models import Pushed as Pushed
    from .models import lora_on_planes as lora_on_planes
    from .models import push as push
    from .nn import use_bits as use_bits
    from .options import BenchOptions as BenchOptions
    from .options import EvaluateOptions as EvaluateOptions
    from .options import ExportOptions as ExportOptions
    from .options import GenerationSettings as GenerationSettings
    from .options import ImportOptions as ImportOptions
    from .options import PlanOptions as PlanOptions
    from .options import PushOptions as PushOptions
    from .options import QuantizeOptions as QuantizeOptions
    from .plans import Plan as Plan
    from .plans import Resized as Resized
    from .plans import layers as layers
    from .plans import load as load
    from .plans import resize as resize
    from .quantization import Report as Report
    from .quantization import quantize as quantize
    from .runtime import Constraint as Constraint
    from .runtime import Conversation as Conversation
    from .runtime import Engine as Engine
    from .runtime import Environment as Environment
    from .runtime import Generation as Generation
    from .runtime import Inspection as Inspection
    from .runtime import Request as Request
    from .runtime import env as env
    from .runtime import generate as generate
    from .runtime import inspect as inspect

_NAMES = {  # room -> what it gives to the top
    "allocation": "PlanReport plan",
    "benchmark": "Bench bench",
    "demonstration": "Demo demo",
    "errors": "BitstrataError",
    "evaluation": "Evaluation evaluate",
    "exchange": "Export Import export_model import_model",
    "models": "BitstrataConfig Pushed lora_on_planes push",
    "nn": "use_bits",
    "options": "BenchOptions EvaluateOptions ExportOptions GenerationSettings ImportOptions PlanOptions "
    "PushOptions QuantizeOptions",
    "plans": "Plan Resized layers load resize",
    "quantization": "Report quantize",
    "runtime": "Constraint Conversation Engine Environment Generation Inspection Request env generate inspect",
}
_HOMES = {name: (room, name) for room, names in _NAMES.items() for name in names.split()}
_HOMES["eval"] = ("evaluation", "evaluate")  # the verb's own name
__all__ = sorted([*_HOMES, "__version__"])


def __getattr__(name: str) -> typing.Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    room, attribute = _HOMES[name]
    found = getattr(importlib.import_module(f".{room}", __name__), attribute)
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
