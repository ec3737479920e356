"""A model with a LoRA adapter merged into it, W + s B A, by PEFT: what can be quantized as any other.

The sum is in memory and in the dtype that the model is stored in, as `merge_and_unload` leaves it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from ..checkpoint.schema import CONFIG_FILE
from ..errors import BitstrataError, ModelError, UsageError, first_line
from ..options import FromHub
from .adapters import CONFIG, check_peft
from .hub import resolve

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


def merged(adapter: str | Path, hub: FromHub) -> tuple[PreTrainedModel, Path]:
    """The causal model that `adapter`, a folder or hub id, was trained on, with it merged in, and a tokenizer's folder.

    The model is in the same folder, or it is the folder or hub id that the adapter names as its base. It is dense and
    on the CPU.

    Raises:
        UsageError: PEFT is not installed, or there is no adapter.
        ModelError: it is damaged, of another kind than LoRA, or its model is not there or another one.
    """
    check_peft()
    import peft

    folder = resolve(adapter, hub=hub, weights=False)
    if not (folder / CONFIG).is_file():
        raise UsageError(f"{adapter} holds no adapter: {CONFIG} is not there", hint="leave --merge-adapter out")
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
        if not isinstance(config, peft.LoraConfig):
            raise ModelError(f"{adapter} is a {type(config).__name__}, not a LoRA adapter", hint="merge it with PEFT")
        has_own, named = (folder / CONFIG_FILE).is_file(), config.base_model_name_or_path
        if not has_own and not named:
            raise ModelError(
                f"{adapter} does not name its model: base_model_name_or_path is empty",
                hint=f"name its folder or hub id in {CONFIG}",
            )
        home = resolve(adapter, hub=hub) if has_own else resolve(str(named), hub=hub.other)
        with _without(home) as base:
            model: Any = AutoModelForCausalLM.from_pretrained(base, dtype="auto", local_files_only=True)
            tuned = peft.PeftModel.from_pretrained(model, str(folder))
            model = tuned.merge_and_unload(safe_merge=True)
    except BitstrataError:
        raise
    except Exception as error:  # whatever PEFT, transformers and the hub raise for what is missing or does not fit
        raise ModelError(
            f"the adapter {adapter} cannot be merged: {first_line(error)}",
            hint="give the folder or hub id of a LoRA adapter whose model is there",
        ) from error
    return model, folder if (folder / "tokenizer_config.json").is_file() else home


@contextmanager
def _without(whole: Path) -> Iterator[Path]:
    """The files of a model without the adapter beside it, which transformers would load on top."""
    with tempfile.TemporaryDirectory(prefix="bitstrata-") as place:
        for path in whole.iterdir():
            if path.name not in ADAPTER:
                (Path(place) / path.name).symlink_to(path.absolute())
        yield Path(place)
