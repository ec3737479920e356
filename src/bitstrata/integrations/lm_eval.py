"""lm-evaluation-harness with our models by name: its command line, and `lm_eval.simple_evaluate(model="bitstrata")`.

    python -m bitstrata.integrations.lm_eval run --model bitstrata --model_args pretrained=OUT,bits=3 --tasks ...

The harness has no entry points for models: what it knows is what was imported. Importing this module registers
`bitstrata`, and the command above imports it and starts the harness's own. `bitstrata eval --tasks` loads a model once
for all of its bits (evaluation/tasks.py); this here is for what only the harness's own command line does.
"""

from __future__ import annotations

from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from ..errors import UsageError
from ..models import load_tokenizer, resolve
from ..models.load import pick_device
from ..plans import load, parse_bits_or_plan


@register_model("bitstrata")
class QuantizedLM(HFLM):  # type: ignore[misc]
    """A checkpoint at one precision, as the harness takes models of transformers.

    Args:
        pretrained: a folder written by `bitstrata quantize`, or a hub id of one.
        bits: a number, or a plan's file; the highest by default. Only the planes that it needs are loaded.
        device, dtype: as in `bitstrata.load`; on a CPU float32 unless told otherwise.
        others: arguments of the harness's `hf` that are not about loading, such as batch_size or max_length.

    Raises what `bitstrata.load` does, UsageError for a model in memory.
    """

    def __init__(
        self,
        pretrained: str,
        bits: int | str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        **others: Any,
    ) -> None:
        if not isinstance(pretrained, str):
            raise UsageError("pretrained must be a folder or a hub id", hint="a loaded model is for `--model hf`")
        where = pick_device(device or "auto")
        if dtype in (None, "auto"):
            dtype = "float32" if where.type == "cpu" else None
        asked = None if bits is None else parse_bits_or_plan(str(bits))
        chosen: dict[str, Any] = {"bits": asked} if asked is None or isinstance(asked, int) else {"plan": asked}
        if isinstance(asked, int):
            chosen["max_bits"] = asked
        model = load(pretrained, device=where, dtype=dtype, **chosen)
        tokenizer = load_tokenizer(resolve(str(model.name_or_path)))
        super().__init__(pretrained=model, tokenizer=tokenizer, **others)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
