"""What stands beside the weights of a checkpoint: config.json, generation_config.json and the tokenizer.

transformers reads them and believes them. Here they are looked at before, so that a file which cannot be used is an
error that names it: what is no file, what is no JSON, values of a type that fails later, and numbers of blocks that
the weights do not have.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from ..checkpoint import CheckpointReader
from ..checkpoint.reader import read_json, regular_file
from ..errors import BitstrataError, CheckpointError, InputError
from .hub import first_line

GENERATION_FILE = "generation_config.json"
MOST_BLOCKS = 1000  # that may be made to find out that there are no weights for them: parts of a model may store none
_BLOCK_COUNT = re.compile(r"(num|n)_(hidden_)?layers?")  # the names that configs have for it

_Count = Annotated[int, Field(ge=1, le=2**31 - 1)] | None
_Length = Annotated[int, Field(ge=0)] | None
_Number = Annotated[float, Field(allow_inf_nan=False)] | None
_Above0 = Annotated[float, Field(gt=0, allow_inf_nan=False)] | None
_TokenId = Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]  # -1 stands for none in some files


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


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model. Raises InputError if there is none, or if it cannot be read or used."""
    try:
        for path in Path(folder).iterdir():
            regular_file(path, InputError)
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
        tokenizer.decode(tokenizer("a").input_ids)  # some values are looked at when they are used, and not before
    except BitstrataError:
        raise
    except Exception as error:
        raise InputError(
            f"{folder} has no usable tokenizer: {first_line(error)}",
            hint="copy tokenizer.json and tokenizer_config.json of the model into the folder",
        ) from error
    if not isinstance(tokenizer.chat_template, str | dict | None):
        raise InputError(
            f"{folder}: chat_template is a {type(tokenizer.chat_template).__name__}, not a template",
            hint="correct it in tokenizer_config.json",
        )
    return tokenizer
