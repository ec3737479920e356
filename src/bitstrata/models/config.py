"""What stands beside the weights of a model: config.json and generation_config.json, judged before a model is built.

transformers reads them and believes them. Here they are looked at first, so that a file which cannot be used is an
error that names it: no JSON, values of a type that fails later, more blocks than there are weights for, a model that
is no causal language model. `AutoModelForCausalLM` gives a class for many that are none: it drops a classifier's
head, puts a random one on an encoder, or keeps half of an encoder-decoder. What was trained is what `architectures`
says, and that class is made, with the towers of one that also sees or hears; what an encoder may see is what its
config says.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig

from ..checkpoint import CheckpointReader
from ..checkpoint.reader import read_json
from ..errors import CheckpointError, ModelError, first_line
from .compat import causal_classes, wrapper_classes

DECODERS = "bitstrata quantizes decoder-only causal language models"
# a base model counts: with tied embeddings it is the whole language model
CAUSAL = re.compile(r".*(CausalLM|LMHeadModel|WithLMHead|ForConditionalGeneration)|(?!.*For)\w+(Model|Decoder)")
# what reads the whole text whatever its config says
BIDIRECTIONAL = ("cpmant", "xlnet")
# what has `is_decoder` in its config and never looks at it
ALWAYS_CAUSAL = ("gpt_neox", "gpt_neox_japanese", "whisper")

# what asks for an image in its code, not in its signature
NEEDS_IMAGES = ("idefics", "kosmos-2", "kosmos-2.5", "pix2struct", "vision-encoder-decoder")

STRETCHED = ("linear", "dynamic", "yarn")  # rope types whose length is factor x the original one
GENERATION_FILE = "generation_config.json"
MOST_BLOCKS = 1000  # that may be made to find out that there are no weights for them: parts of a model may store none
_BLOCK_COUNT = re.compile(r"(num|n)_(hidden_)?layers?")  # the names that configs have for it

_Count = Annotated[int, Field(ge=1, le=2**31 - 1)] | None
_Length = Annotated[int, Field(ge=0)] | None
_Number = Annotated[float, Field(allow_inf_nan=False)] | None
_Above0 = Annotated[float, Field(gt=0, allow_inf_nan=False)] | None
_TokenId = Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]  # -1 stands for none in some files


def causal_class(config: PreTrainedConfig) -> tuple[Any, PreTrainedConfig]:
    """The class of the model that `config` describes, and the config that this class takes.

    It is the one that was trained, which may also see or hear, where `architectures` names one that transformers makes
    of such a config; else the first that it makes. If that is of the text model alone, so is the config. Raises
    KeyError if there is none.
    """
    mappings = (causal_classes(), wrapper_classes())
    known = [mapping[type(config)] for mapping in mappings if type(config) in mapping]
    kinds = [kind for one in known for kind in (one if isinstance(one, (tuple, list)) else [one])]
    if not kinds:
        raise KeyError(type(config))
    named = config.architectures if isinstance(config.architectures, list) else []
    found = next((kind for kind in kinds if kind.__name__ in named), kinds[0])
    text = config.sub_configs.get("text_config")
    if text is not None and getattr(found, "config_class", None) == text:
        return found, config.get_text_config()
    return found, config


def check_causal(folder: Path, config: PreTrainedConfig) -> None:
    """Raise ModelError, naming the architecture, unless `config` is of a model that predicts the next token."""
    try:
        kind, _ = causal_class(config)
    except KeyError:
        raise ModelError(
            f"{folder}: {config.model_type!r} is not a causal language model of transformers", hint=DECODERS
        ) from None
    named = config.architectures
    trained = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    own = kind.__name__
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
    wanted = _beside_text(kind, config)
    if wanted:
        raise ModelError(f"{folder} holds a {own}, which cannot be given text alone: it needs {wanted}", hint=DECODERS)


def _beside_text(kind: Any, config: PreTrainedConfig) -> str:
    """What a model of class `kind` must be given beside tokens, in words; "" if nothing."""
    if config.model_type in NEEDS_IMAGES:
        return "an image with every text"
    parameters = list(inspect.signature(kind.forward).parameters.values())[1:]
    needed = [
        item.name for item in parameters if item.default is item.empty and item.kind is item.POSITIONAL_OR_KEYWORD
    ]
    return ", ".join(name for name in needed if name != "input_ids")


def _sees_later_tokens(config: PreTrainedConfig) -> bool:
    text = config.get_text_config(decoder=True)
    if text.model_type in BIDIRECTIONAL or getattr(text, "causal", True) is False:
        return True
    if getattr(text, "use_bidirectional_attention", None) in (True, "all"):
        return True
    return getattr(text, "is_decoder", True) is False and text.model_type not in ALWAYS_CAUSAL


def context_limit(config: PreTrainedConfig) -> int | None:
    """The longest sequence, in tokens, that a model of this config was made for; None if it does not say.

    Configs say in two ways that rotary positions are stretched past the length of training: with
    `max_position_embeddings` as it was, to be multiplied by `factor` (linear, dynamic, yarn), or with
    `max_position_embeddings` already raised (llama3, longrope).
    """
    text = config.get_text_config(decoder=True)
    limit: int | None = getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", None)
    rope = getattr(text, "rope_parameters", None)
    if limit is None or not isinstance(rope, Mapping):
        return limit
    # some models rotate by layer type; a layer type that is not stretched holds the others to its length
    nested = [part for part in rope.values() if isinstance(part, Mapping)]
    return min(_stretched(limit, part) for part in nested or [rope])


def steady_context(config: PreTrainedConfig) -> int | None:
    """The longest sequence whose rotary positions do not depend on how long the others in its batch are; or None.

    Rotary embeddings of the types here change their frequencies for a whole batch once its longest sequence passes the
    length that the model was first trained at.
    """
    text = config.get_text_config(decoder=True)
    limit = context_limit(config)
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = {item.get("rope_type") for item in [rope, *rope.values()] if isinstance(item, dict)}
    if kinds & {"longrope", "dynamic"}:
        first = rope.get("original_max_position_embeddings") or getattr(text, "original_max_position_embeddings", None)
        if first is not None:
            return min(first, limit) if limit is not None else int(first)
    return limit


def _stretched(limit: int, rope: Mapping[str, Any]) -> int:
    factor, original = rope.get("factor"), rope.get("original_max_position_embeddings") or limit
    if rope.get("rope_type", rope.get("type")) not in STRETCHED:
        return limit
    if not isinstance(factor, (int, float)) or not isinstance(original, (int, float)):
        return limit
    length = factor * original
    return max(limit, int(length)) if math.isfinite(length) else limit


class _GenerationFile(BaseModel):
    """The values of generation_config.json that decide what is generated; others are left to transformers."""

    model_config = ConfigDict(extra="allow", strict=True)

    bos_token_id: _TokenId | list[_TokenId] | None = None
    eos_token_id: _TokenId | list[_TokenId] | None = None
    pad_token_id: _TokenId | None = None
    max_length: _Count = None
    max_new_tokens: _Count = None
    min_length: _Length = None
    min_new_tokens: _Length = None
    max_time: _Above0 = None
    stop_strings: str | list[str] | None = None
    do_sample: bool | None = None
    use_cache: bool | None = None
    num_beams: _Count = None
    num_return_sequences: _Count = None
    temperature: _Number = None
    top_k: _Length = None
    top_p: _Number = None
    min_p: _Number = None
    typical_p: _Number = None
    epsilon_cutoff: _Number = None
    eta_cutoff: _Number = None
    repetition_penalty: _Above0 = None
    length_penalty: _Number = None
    no_repeat_ngram_size: _Length = None
    guidance_scale: _Number = None
    bad_words_ids: Annotated[list[Annotated[list[_TokenId], Field(min_length=1)]], Field(min_length=1)] | None = None
    suppress_tokens: list[_TokenId] | None = None
    begin_suppress_tokens: list[_TokenId] | None = None
    output_attentions: bool | None = None
    output_hidden_states: bool | list[int] | None = None
    output_scores: bool | None = None
    output_logits: bool | None = None
    return_dict_in_generate: bool | None = None


def read_config(folder: Path, reader: CheckpointReader) -> PreTrainedConfig:
    """The model's config. Raises CheckpointError if transformers cannot use it, or if it has more blocks than weights.

    The blocks are counted first: transformers makes lists, and then modules, as long as the config says.
    """
    stored = len({block[0] for name in reader.weight_map if (block := re.match(r".*?\.\d+(?=\.)", name))})
    for field, count in _block_counts(reader.config):
        if count > max(stored, MOST_BLOCKS):
            raise CheckpointError(
                f"{folder / 'config.json'} describes a model of {count} blocks ({field}), the files have weights for "
                f"{stored}",
                hint="config.json and the weights are of different models; copy or download them again",
            )
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        raise CheckpointError(f"{folder} has no usable config.json: {first_line(error)}") from error
    return config


def _block_counts(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, int]]:
    """Every number of blocks in a config and the configs inside it: (its name, the number)."""
    for key, value in config.items():
        if isinstance(value, Mapping) and key != "quantization_config":
            yield from _block_counts(value, f"{prefix}{key}.")
        elif isinstance(value, int) and _BLOCK_COUNT.fullmatch(key):
            yield prefix + key, value


def read_generation_config(folder: Path, vocab_size: int | None) -> GenerationConfig | None:
    """The defaults of `generate` beside a model, if there are any. Raises CheckpointError if they cannot be used.

    `vocab_size` is the model's, None where its config has none.
    """
    path = folder / GENERATION_FILE
    if not path.exists():
        return None
    values = read_json(path)
    hint = f"correct {path}, or delete it: the model then has its config's defaults"
    try:
        checked = _GenerationFile.model_validate(values)
        config = GenerationConfig.from_pretrained(str(folder), local_files_only=True)
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(f"{path}: {first['loc'][0]}: {first['msg']}", hint=hint) from error
    except Exception as error:
        raise CheckpointError(f"{path} cannot be used: {first_line(error)}", hint=hint) from error
    # suppressed tokens beyond the vocabulary are without effect; words are looked up in it
    for token in chain(*(checked.bad_words_ids or [])):
        if token < 0 or (vocab_size is not None and token >= vocab_size):
            size = "" if vocab_size is None else f"; the model has {vocab_size} tokens"
            raise CheckpointError(f"{path} bars token {token}, which is none of the model's{size}", hint=hint)
    for name in checked.model_fields_set & _GenerationFile.model_fields.keys():
        if isinstance(value := getattr(checked, name), float):  # transformers refuses some of them as integers
            setattr(config, name, value)
    return config
