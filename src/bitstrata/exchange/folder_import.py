"""Folders of safetensors that other programs wrote, as sources.

    GPTQ                 qweight int32 [K b / 32, N], codes along K      qzeros int32 [J, N b / 32]    scales [J, N]
                         g_idx int32 [K], the group of each column       W = scale (q - zero)
                         format gptq (v1): a zero point is stored less 1;  gptq_v2: as it is
    AWQ (gemm)           qweight int32 [K, N / 8], qzeros int32 [J, N / 8], codes along N in the order ORDER
                         scales [J, N]                                   W = scale (q - zero)
    compressed-tensors   weight_packed int32 [N, K b / 32], codes plus 2^(b-1); weight_scale [N, J];
    (pack-quantized)     weight_zero_point int32 [N b / 32, J], along N; weight_shape      W = scale (q - zero)

    BPDQ, AnyBCQ, Any-Precision LLM                                      plane_import.py

Columns in another order than groups (act-order) are refused: planes have groups of neighbouring columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import TensorEntry
from ..checkpoint.reader import read_json
from ..checkpoint.schema import CONFIG_FILE, SAFETENSORS_DTYPES
from ..errors import CheckpointError, ModelError
from ..planes import PlaneWeight, group_count
from ..planes.weights import MAX_BITS
from ..progress import note
from ..quantization.companions import copy_companions
from .plane_import import anybcq_weight, anyprecision_weight, bpdq_coefficients
from .sources import Layer, Source
from .stored import Stored
from .streams import unpack_stream
from .uniform import Coefficients, Grid, grid_from_groups

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the column, of 8, that each 4 bits of an AWQ word are of
FIELDS = {  # of a quantization_config that say nothing else than what is read, or nothing of the weights
    "gptq": """quant_method bits group_size desc_act sym checkpoint_format meta damp_percent damp_auto_increment
        true_sequential model_seqlen dataset lm_head pack_dtype static_groups model_name_or_path batch_size
        model_file_base_name is_marlin_format tokenizer use_cuda_fp16 block_name_to_quantize pad_token_id
        module_name_preceding_first_block use_exllama max_input_length exllama_config cache_block_outputs
        modules_in_block_to_quantize backend disable_exllama method format act_group_aware quant_format""",
    "awq": """quant_method bits w_bit group_size q_group_size zero_point version modules_to_not_convert do_fuse
        backend fuse_max_seq_len exllama_config modules_to_fuse""",
    "bpdq": """quant_method bits group_size desc_act sym checkpoint_format meta damp_percent damp_auto_increment
        true_sequential lm_head pack_dtype static_groups bpdq msbits method format act_group_aware quant_format""",
    "anybcq": "seed_precision parent_precision group_size arch_config",
    "anyprec": "seed_precision parent_precision arch_config",
    "compressed-tensors": """quant_method config_groups format global_compression_ratio ignore kv_cache_scheme
        quantization_status version sparsity_config transform_config""",
}


Reader = Callable[[Stored, str, Mapping[str, Any]], Grid | Coefficients | PlaneWeight]  # files, a layer, the settings


def gptq_grid(stored: Stored, name: str, settings: Mapping[str, Any]) -> Grid:
    """The layer `name` of a folder of GPTQ. Raises ModelError for what planes do not hold."""
    bits = int(settings["bits"])
    qweight, scales = stored.read(f"{name}.qweight"), stored.read(f"{name}.scales").T
    rows, groups = scales.shape
    columns = qweight.shape[0] * 32 // bits
    size = _group_size(name, settings["group_size"], columns, groups)
    if f"{name}.g_idx" in stored.files:
        _check_order(name, stored.read(f"{name}.g_idx"), size)
    code = unpack_stream(qweight.T, bits, columns)
    zero = unpack_stream(stored.read(f"{name}.qzeros"), bits, rows).T.double()
    if settings.get("checkpoint_format", settings.get("format", "gptq")) != "gptq_v2":
        if bool((zero == 2**bits - 1).any()):
            raise ModelError(
                f"{name} has zero points that are 0 to some programs and {2**bits} to others (format gptq)",
                hint="convert it to gptq_v2 with GPTQModel",
            )
        zero = zero + 1
    step = scales.double()
    return grid_from_groups(code, step, -step * zero, bits, size)


def _awq(stored: Stored, name: str, settings: Mapping[str, Any]) -> Grid:
    qweight, scales = stored.read(f"{name}.qweight"), stored.read(f"{name}.scales").T
    rows, groups = scales.shape
    columns = qweight.shape[0]
    given = settings.get("group_size", settings.get("q_group_size", 128))
    order = torch.argsort(torch.tensor(ORDER))

    def codes(words: Tensor) -> Tensor:  # [R, N / 8] -> [N, R]
        return unpack_stream(words, 4, rows).view(len(words), -1, 8)[:, :, order].flatten(1).T

    step = scales.double()
    zero = codes(stored.read(f"{name}.qzeros")).double()
    size = _group_size(name, given, columns, groups)
    return grid_from_groups(codes(qweight), step, -step * zero, 4, size)


def _compressed(stored: Stored, name: str, settings: Mapping[str, Any]) -> Grid:
    packed, scale = stored.read(f"{name}.weight_packed"), stored.read(f"{name}.weight_scale")
    rows, columns = (int(size) for size in stored.read(f"{name}.weight_shape"))
    scale = scale.view(rows, -1)
    known = [group["weights"] for group in settings["config_groups"].values()]
    fits = [one for one in known if _words_fit(packed, one["num_bits"], columns)]
    if not fits:
        raise ModelError(f"{name}: no group of the config has its bits", hint="config.json is of another model")
    bits = int(fits[0]["num_bits"])
    size = _group_size(name, fits[0].get("group_size") or -1, columns, scale.shape[1])
    if f"{name}.weight_g_idx" in stored.files:
        _check_order(name, stored.read(f"{name}.weight_g_idx"), size)
    step, middle = scale.double(), 2.0 ** (bits - 1)
    zero = torch.full_like(step, middle)
    if f"{name}.weight_zero_point" in stored.files:
        zero = unpack_stream(stored.read(f"{name}.weight_zero_point").T, bits, rows).T.double()
    return grid_from_groups(unpack_stream(packed, bits, columns), step, -step * zero, bits, size)


def _words_fit(packed: Tensor, bits: int, columns: int) -> bool:
    return bool(packed.shape[1] == -(-columns * bits // 32))


def _group_size(name: str, given: int, columns: int, groups: int) -> int:
    size = columns if given in (-1, 0) else int(given)
    if group_count(columns, size) != groups:
        raise ModelError(
            f"{name} has {groups} groups of {columns} columns, not of the {given} that config.json says",
            hint="groups of several sizes in a model are not known here",
        )
    return size


def _check_order(name: str, group: Tensor, size: int) -> None:
    if not torch.equal(group.long(), torch.arange(len(group)) // size):
        raise ModelError(
            f"{name} has its columns in another order than its groups (act-order), which planes do not hold",
            hint="quantize it without desc_act, or with static groups",
        )


def _check_awq(settings: Mapping[str, Any]) -> None:
    bits = settings.get("bits", settings.get("w_bit", 4))
    if bits != 4 or settings.get("version", "gemm").lower() != "gemm" or not settings.get("zero_point", True):
        raise ModelError(
            f"AWQ of version {settings.get('version')!r} with {bits} bits is not known here", hint="gemm, 4 bits is"
        )


def _check_compressed(settings: Mapping[str, Any]) -> None:
    if settings.get("format") != "pack-quantized":
        raise ModelError(
            f"compressed-tensors of format {settings.get('format')!r} is not known here", hint="pack-quantized is"
        )
    for field in ("sparsity_config", "transform_config", "kv_cache_scheme"):
        if settings.get(field):
            raise ModelError(f"compressed-tensors with {field} is not known here", hint="quantize the original model")
    for group in settings["config_groups"].values():
        weights = group["weights"]
        if weights.get("type", "int") != "int" or weights.get("strategy", "group") not in ("group", "channel"):
            raise ModelError(
                f"compressed-tensors of {weights.get('type')}, by {weights.get('strategy')}, is not known here",
                hint="int by group or channel is",
            )
        if group.get("input_activations"):
            note("the model was made for quantized activations, which are left as they are here")


def _check_gptq(settings: Mapping[str, Any]) -> None:
    if settings["bits"] not in (2, 3, 4, 8):
        raise ModelError(f"GPTQ of {settings['bits']} bits is not known here", hint="2, 3, 4 and 8 are")
    form = settings.get("checkpoint_format", settings.get("format", "gptq"))
    if form not in ("gptq", "gptq_v2"):
        raise ModelError(f"GPTQ of format {form!r} is not known here", hint="gptq and gptq_v2 are")


def _check_precisions(settings: Mapping[str, Any]) -> None:
    if not 1 <= settings["seed_precision"] <= settings["parent_precision"] <= MAX_BITS:
        raise ModelError(f"no precisions {settings['seed_precision']} to {settings['parent_precision']}", hint="1 to 8")


def _check_bpdq(settings: Mapping[str, Any]) -> None:
    if settings.get("desc_act"):
        raise ModelError("BPDQ with desc_act is not known here", hint="quantize it without")


@dataclass(frozen=True)
class _Kind:
    """ends: of the names of a layer's tensors, the first of one that every layer has."""

    ends: Sequence[str]
    read: Reader
    check: Callable[[Mapping[str, Any]], None]


def _each(name: str) -> list[str]:
    return [f".{name}{bits}" for bits in range(1, MAX_BITS + 1)]


KINDS: Mapping[str, _Kind] = MappingProxyType(
    {
        "gptq": _Kind((".qweight", ".qzeros", ".scales", ".g_idx"), gptq_grid, _check_gptq),
        "awq": _Kind((".qweight", ".qzeros", ".scales"), _awq, _check_awq),
        "bpdq": _Kind((".B", ".c"), bpdq_coefficients, _check_bpdq),
        "anybcq": _Kind((".qweight", ".q_bias", *_each("alpha_"), *_each("beta_")), anybcq_weight, _check_precisions),
        "anyprec": _Kind((".qweight", *_each("lut")), anyprecision_weight, _check_precisions),
        "compressed-tensors": _Kind(
            (".weight_packed", ".weight_scale", ".weight_zero_point", ".weight_shape", ".weight_g_idx"),
            _compressed,
            _check_compressed,
        ),
    }
)


def open_folder(folder: Path) -> Source:
    """Raises ModelError for a folder that is not whole, or of a program or with settings that are not known here."""
    try:
        config = read_json(folder / CONFIG_FILE)
    except CheckpointError as error:
        raise ModelError(error.message, hint="a model's folder has a config.json") from error
    own = next((key for key in ("anybcq", "anyprec") if key in config), None)  # these have a field of their own
    settings = config.pop(own or "quantization_config", None)
    if not isinstance(settings, dict):
        raise ModelError(f"{folder} is not quantized", hint="`bitstrata quantize` quantizes a model")
    method = own or settings.get("quant_method")
    kind = KINDS.get(str(method))
    if kind is None:
        raise ModelError(f"{folder} is quantized by {method!r}, which is not known here", hint=", ".join(KINDS))
    unknown = sorted(key for key in settings.keys() - set(FIELDS[str(method)].split()) if settings[key])
    if unknown:
        raise ModelError(
            f"{folder}: {own or 'quantization_config'}.{unknown[0]} is not known here",
            hint="what it says might be lost",
        )
    try:
        kind.check(settings)
    except (KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{folder}: quantization_config lacks or garbles {error}", hint="download it again") from error
    stored = Stored.of(folder)
    names = sorted(name.removesuffix(kind.ends[0]) for name in stored.files if name.endswith(kind.ends[0]))
    layers = {name: _layer(stored, name, settings, kind) for name in names}
    used = {f"{name}{end}" for name in names for end in kind.ends}
    kept = {name: _kept(stored, name) for name in stored.files if name not in used}
    dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "float16"))
    return Source(
        format=str(method),
        layers=layers,
        kept=kept,
        config=config,
        dtype=dtype,
        copy=lambda output: copy_companions(stored, output),
        size=sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        settings={key: value for key, value in settings.items() if isinstance(value, (str, int, float, bool))},
    )


def _layer(stored: Stored, name: str, settings: Mapping[str, Any], kind: _Kind) -> Layer:
    def read() -> Grid | Coefficients | PlaneWeight:
        try:
            return kind.read(stored, name, settings)
        except (ValueError, KeyError, RuntimeError, ZeroDivisionError) as error:
            raise ModelError(f"{name} in {stored.folder} is not as its config says: {error}") from error

    bits: tuple[int, ...] = (int(settings.get("bits") or settings.get("w_bit") or 4),)
    if kind is KINDS["compressed-tensors"]:
        columns = int(stored.read(f"{name}.weight_shape")[1])
        bits = (stored.shape(f"{name}.weight_packed")[1] * 32 // columns,)
    elif kind is KINDS["bpdq"]:
        bits = (stored.shape(f"{name}.B")[1],)
    elif "parent_precision" in settings:
        bits = tuple(range(settings["seed_precision"], settings["parent_precision"] + 1))
    role = "head" if name.rpartition(".")[2] == "lm_head" else None
    return Layer(bits, read, f"{name}.bias" in stored.files, role)


def _kept(stored: Stored, name: str) -> TensorEntry:
    dtype, shape = stored.files[name].spec(name)
    if dtype not in SAFETENSORS_DTYPES:
        raise ModelError(f"{name} is stored as {dtype}, which is not known here", hint="quantize the original model")
    return TensorEntry(name, SAFETENSORS_DTYPES[dtype], shape, lambda: stored.read(name))
