"""A GGUF file as a source: its layers on grids, by the names of transformers, config and tokenizer of its metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, processors
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerFast

from ..checkpoint import TensorEntry
from ..errors import ModelError, first_line
from ..models.config import causal_class
from .ggml_codes import GRIDS, grid_of_blocks
from .gguf_file import PRETOKENIZERS, gguf_package, pre_tokenizer_of
from .gguf_model import ARCHITECTURES, GEMMA2_27B, rope_factors, turned_rows
from .sources import Layer, Source, skeleton_of
from .uniform import Grid

PLAIN = ("F32", "F16", "BF16")
FREQUENCIES = "rope_freqs.weight"
FIELDS = {  # of an architecture's metadata -> of its config
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "vocab_size": "vocab_size",
}


def open_gguf(path: Path) -> Source:
    """Raises ModelError for a file that is not whole or not known here, UsageError without the package."""
    gguf = gguf_package()
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:
        raise ModelError(f"{path} is not a whole GGUF file: {first_line(error)}", hint="download it again") from error
    if fields.get("split.count", 1) > 1:
        raise ModelError(f"{path} is one of {fields['split.count']} files", hint="merge them with llama-gguf-split")
    config = _config(path)
    known = ARCHITECTURES.get(config.model_type)
    if known is None:
        raise ModelError(
            f"{path} holds the architecture {fields.get('general.architecture')!r}, which is not known here",
            hint=f"known are {', '.join(ARCHITECTURES)}",
        )
    tensors = {one.name: one for one in reader.tensors}
    _complete(path, config, fields, tensors)
    tensors.pop(FREQUENCIES, None)
    tokenizer = _tokenizer(path, fields)
    names = _names(path, gguf, known.name, config, tensors)
    kept, layers = {}, {}
    for name, stored in names.items():
        tensor = tensors[stored]
        kind = tensor.tensor_type.name
        order = turned_rows(name.rpartition(".")[0], config) if known.turned else None
        if kind in PLAIN:
            raised = known.raised and name.endswith("norm.weight")
            kept[name] = _plain(name, tensor, order, raised)
        elif kind in GRIDS and name.endswith(".weight"):
            layers[name.removesuffix(".weight")] = _layer(name, tensor, order, gguf)
        else:
            raise ModelError(
                f"{path} holds {stored} as {kind}, whose levels planes do not hold",
                hint=f"known are {', '.join((*PLAIN, *GRIDS))}; or quantize the original model",
            )
    layers = _with_roles(layers, names, config)
    dtype = _narrowest([entry.read() for entry in kept.values()])
    kept = {name: _cast(entry, dtype) for name, entry in kept.items()}
    kind = causal_class(config)[0]
    described = json.loads(config.to_json_string(use_diff=True))
    described |= {"architectures": [kind.__name__], "dtype": str(dtype).removeprefix("torch.")}
    described.pop("_name_or_path", None)

    return Source(
        format="gguf",
        layers=layers,
        kept=kept,
        config=described,
        dtype=dtype,
        copy=lambda folder: tokenizer.save_pretrained(folder),
        size=path.stat().st_size,
        settings={"types": sorted({tensors[stored].tensor_type.name for stored in names.values()})},
    )


def _config(path: Path) -> PreTrainedConfig:
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
    except Exception as error:
        raise ModelError(
            f"transformers does not read the metadata of {path}: {first_line(error)}",
            hint="quantize the original model instead",
        ) from error
    return config


def _complete(path: Path, config: PreTrainedConfig, fields: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    """Put into `config` what transformers leaves at its defaults, though the file says it."""
    architecture = fields["general.architecture"]
    for field, attribute in FIELDS.items():
        if (value := fields.get(f"{architecture}.{field}")) is not None and hasattr(config, attribute):
            setattr(config, attribute, value or None)  # a window of 0 is none
    if hasattr(config, "query_pre_attn_scalar"):
        is_wide = (config.num_hidden_layers, config.hidden_size // config.num_attention_heads) == GEMMA2_27B
        config.query_pre_attn_scalar = GEMMA2_27B[1] if is_wide else config.head_dim
    if hasattr(config, "attention_bias"):
        config.attention_bias = "blk.0.attn_q.bias" in tensors
    rope = config.rope_parameters
    local = fields.get(f"{architecture}.rope.freq_base_swa")
    if "sliding_attention" in rope and local is not None:
        rope["sliding_attention"]["rope_theta"] = local
    stretched = rope.get("full_attention", rope)
    kind = fields.get(f"{architecture}.rope.scaling.type", "none")
    if kind in ("linear", "yarn"):
        stretched |= {"rope_type": kind, "factor": fields[f"{architecture}.rope.scaling.factor"]}
    elif kind != "none":
        raise _unknown_positions(path)
    if kind == "yarn":
        stretched["original_max_position_embeddings"] = fields[f"{architecture}.rope.scaling.original_context_length"]
    if FREQUENCIES in tensors:
        _stretch(path, config, torch.from_numpy(tensors[FREQUENCIES].data.astype(np.float64)))


def _stretch(path: Path, config: PreTrainedConfig, factors: Tensor) -> None:
    """Have `config` rotate as the factors of its frequencies say, which must be those of a Llama 3."""
    rope = {
        **config.rope_parameters,
        "rope_type": "llama3",
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
    for context in (1 << power for power in range(5, 18)):  # that it was trained on before
        config.rope_parameters = {**rope, "original_max_position_embeddings": context}
        if torch.allclose(rope_factors(config).double(), factors.flatten(), rtol=1e-5):
            return
    raise _unknown_positions(path)


def _unknown_positions(path: Path) -> ModelError:
    return ModelError(f"{path} stretches positions in a way that is not known here", hint="quantize the original model")


def _tokenizer(path: Path, fields: Mapping[str, Any]) -> Any:
    """The tokenizer of the file's metadata. Raises ModelError for one that is not known here."""
    kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if kind == "gpt2" and pre not in PRETOKENIZERS:
        raise ModelError(
            f"{path} splits texts by {pre!r}, which is not known here", hint=f"known are {', '.join(PRETOKENIZERS)}"
        )
    if kind not in ("gpt2", "llama"):
        raise ModelError(f"{path} has a tokenizer {kind!r}, which is not known here", hint="known are gpt2 and llama")
    tokenizer = _byte_level(fields, str(pre)) if kind == "gpt2" else _pieces(path)
    adds = bool(fields.get("tokenizer.ggml.add_bos_token", kind == "llama" or pre == "llama-bpe"))
    if adds and tokenizer.bos_token is None:
        raise ModelError(f"{path} puts a BOS token before texts and names none", hint="is the file whole?")
    if adds:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, tokenizer.bos_token_id)]
        )
    return tokenizer


def _byte_level(fields: Mapping[str, Any], pre: str) -> PreTrainedTokenizerFast:
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre == "llama-bpe"))
    backend.pre_tokenizer = pre_tokenizer_of(pre)
    backend.decoder = decoders.ByteLevel()
    kinds = gguf_package().TokenType
    added = [
        (token, kind) for token, kind in zip(tokens, types, strict=True) if kind in (kinds.CONTROL, kinds.USER_DEFINED)
    ]
    for token, kind in added:
        one = AddedToken(token, special=kind == kinds.CONTROL, normalized=False)
        (backend.add_special_tokens if one.special else backend.add_tokens)([one])
    places = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    special = {
        name: tokens[fields[f"tokenizer.ggml.{place}_token_id"]]
        for name, place in places.items()
        if f"tokenizer.ggml.{place}_token_id" in fields
    }
    template = fields.get("tokenizer.chat_template")
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **special)


def _pieces(path: Path) -> Any:
    """SentencePiece, as transformers reads it."""
    try:
        return AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    except Exception as error:
        raise ModelError(
            f"transformers does not read the tokenizer of {path}: {first_line(error)}", hint="quantize the original"
        ) from error


def _names(
    path: Path, gguf: Any, architecture: str, config: PreTrainedConfig, tensors: Mapping[str, Any]
) -> dict[str, str]:
    """Name in transformers -> name in the file. Raises ModelError unless it holds this model and nothing else."""
    model = skeleton_of(config)
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture], config.num_hidden_layers)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: table.get_name(name, try_suffixes=(".weight", ".bias")) for name in shapes}
    if config.tie_word_embeddings:
        found.pop("lm_head.weight", None)
    for name, stored in found.items():
        if stored not in tensors:
            raise ModelError(f"{path} stores no tensor for {name}", hint="is the file whole?")
        shape = tuple(int(size) for size in reversed(tensors[stored].shape))
        if shape != shapes[name]:
            raise ModelError(f"{path}: {stored} is {list(shape)}, {list(shapes[name])} in the model")
    unknown = sorted(tensors.keys() - set(found.values()))
    if unknown:
        raise ModelError(f"{path} holds {unknown[0]}, which the model lacks", hint="quantize the original model")
    return found


def _back(value: Tensor, order: Tensor | None) -> Tensor:
    return value if order is None else torch.empty_like(value).index_copy_(0, order, value)


def _plain(name: str, tensor: Any, order: Tensor | None, raised: bool) -> TensorEntry:
    def read() -> Tensor:
        data = torch.from_numpy(np.array(tensor.data))
        if tensor.tensor_type.name == "BF16":
            data = data.view(torch.bfloat16)
        shape = [int(size) for size in reversed(tensor.shape)]
        value = _back(data.float().view(shape), order)
        return value - 1 if raised else value

    return TensorEntry(name, torch.float32, tuple(int(size) for size in reversed(tensor.shape)), read)


def _cast(entry: TensorEntry, dtype: torch.dtype) -> TensorEntry:
    return TensorEntry(entry.name, dtype, entry.shape, lambda: entry.read().to(dtype))


def _narrowest(values: list[Tensor]) -> torch.dtype:
    """The narrowest dtype that holds all of them."""
    for dtype in (torch.bfloat16, torch.float16):
        if all(torch.equal(value.to(dtype).float(), value) for value in values):
            return dtype
    return torch.float32


def _layer(name: str, tensor: Any, order: Tensor | None, gguf: Any) -> Layer:
    kind = tensor.tensor_type.name
    size = gguf.GGML_QUANT_SIZES[tensor.tensor_type][1]

    def read() -> Grid:
        data = torch.from_numpy(np.array(tensor.data))
        return grid_of_blocks(kind, _back(data.view(torch.uint8), order), size)

    return Layer((GRIDS[kind][0],), read)


def _with_roles(layers: Mapping[str, Layer], names: Mapping[str, str], config: PreTrainedConfig) -> dict[str, Layer]:
    """Embedding and head by their roles, and which layers have a bias."""
    found = {}
    for name, layer in layers.items():
        stored = names[f"{name}.weight"]
        role = {"token_embd.weight": "embedding", "output.weight": "head"}.get(stored)
        tied = "lm_head" if role == "embedding" and config.tie_word_embeddings else None
        found[name] = Layer(layer.bits, layer.read, f"{name}.bias" in names, role, tied)
    return found
