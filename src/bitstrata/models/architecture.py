"""Whether a config is of a causal language model, judged before a skeleton is built.

`AutoModelForCausalLM` gives a class for many models that are none: it drops a classifier's head,
puts a random one on an encoder, or keeps half of an encoder-decoder. What was trained is what
`architectures` says; what an encoder may see is what its config says.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedConfig

from ..errors import ModelError

DECODERS = "bitstrata quantizes decoder-only causal language models"
# a base model counts: with tied embeddings it is the whole language model
CAUSAL = re.compile(r".*(CausalLM|LMHeadModel|WithLMHead|ForConditionalGeneration)|(?!.*For)\w+(Model|Decoder)")
# what reads the whole text whatever its config says
BIDIRECTIONAL = ("cpmant", "xlnet")
# what has `is_decoder` in its config and never looks at it
ALWAYS_CAUSAL = ("gpt_neox", "gpt_neox_japanese", "whisper")


def causal_class(config: PreTrainedConfig) -> tuple[Any, PreTrainedConfig]:
    """The class that AutoModelForCausalLM makes of `config`, and the config that this class takes.

    The second is the text part of `config` where the class is that of the text model alone.
    """
    mapping: Any = AutoModelForCausalLM._model_mapping
    found = mapping[type(config)]
    if isinstance(found, (tuple, list)):
        found = found[0]
    text = config.sub_configs.get("text_config")
    if text is not None and getattr(found, "config_class", None) == text:
        return found, config.get_text_config()
    return found, config


def check_causal(folder: Path, config: PreTrainedConfig) -> None:
    """Raise ModelError, naming the architecture, unless `config` is of a model that predicts the next token."""
    if type(config) not in AutoModelForCausalLM._model_mapping:  # not .keys(): that imports every architecture
        raise ModelError(
            f"{folder}: {config.model_type!r} is not a causal language model of transformers", hint=DECODERS
        )
    named = config.architectures
    trained = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    own = causal_class(config)[0].__name__
    if trained and own not in trained and not any(CAUSAL.fullmatch(name) for name in trained):
        raise ModelError(
            f"{folder} holds a {trained[0]}, which is not a causal language model: its head would be lost",
            hint=f"{DECODERS}; `architectures` in config.json says what the weights are of, {own} would do",
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{folder} holds a {(trained or [own])[0]}, an encoder-decoder", hint=DECODERS)
    if _sees_later_tokens(config):
        raise ModelError(
            f"{folder} holds a {(trained or [own])[0]} that sees later tokens: an encoder, not a causal language model",
            hint=DECODERS,
        )


def _sees_later_tokens(config: PreTrainedConfig) -> bool:
    text = config.get_text_config(decoder=True)
    if text.model_type in BIDIRECTIONAL or getattr(text, "causal", True) is False:
        return True
    if getattr(text, "use_bidirectional_attention", None) in (True, "all"):
        return True
    return getattr(text, "is_decoder", True) is False and text.model_type not in ALWAYS_CAUSAL
