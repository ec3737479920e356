"""One model, every precision: quantize once into nested bit-planes, run at any number of bits.

    bitstrata.quantize("path/to/model", "out", bits="2-4", calibration="text.txt")
    model = bitstrata.load("out", bits=4)
    model.generate(**inputs, bits=2)

Importing bitstrata registers its checkpoints with transformers, so
`AutoModelForCausalLM.from_pretrained("out")` works too.
"""

from .allocation import plan
from .benchmark import bench
from .demonstration import demo
from .errors import BitstrataError
from .evaluation import evaluate
from .nn import use_bits
from .plans import layers, load, resize
from .quantization import quantize
from .runtime import env, generate, inspect
from .version import __version__

eval = evaluate  # the verb's own name

__all__ = [
    "BitstrataError",
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
