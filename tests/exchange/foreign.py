"""Folders as GPTQ, AWQ and compressed-tensors lay them out, packed here bit by bit, and the weights that they mean."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

LAYERS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)


def words(codes: Sequence[Sequence[int]], bits: int) -> Tensor:
    """Rows of codes in 32-bit words, by the arithmetic of large integers."""
    rows = []
    for row in codes:
        number = sum(int(code) << (bits * place) for place, code in enumerate(row))
        count = -(-len(row) * bits // 32)
        found = [(number >> (32 * word)) & 0xFFFFFFFF for word in range(count)]
        rows.append([value - (1 << 32) if value >= 1 << 31 else value for value in found])
    return torch.tensor(rows, dtype=torch.int32)


def random_layer(N: int, K: int, bits: int, size: int, *, sym: bool, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [N, K], scales fp16 [N, J] and zero points [N, J]."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-K // size)
    code = torch.randint(0, 2**bits, (N, K), generator=generator)
    scale = (torch.rand(N, groups, generator=generator) * 0.02 + 0.005).half()
    zero = torch.randint(1, 2**bits - 1, (N, groups), generator=generator)
    return code, scale, torch.full_like(zero, 2 ** (bits - 1)) if sym else zero


def meaning(code: Tensor, scale: Tensor, zero: Tensor, size: int) -> Tensor:
    columns = torch.arange(code.shape[1]) // size
    return scale.double()[:, columns] * (code - zero[:, columns]).double()


def gptq(code: Tensor, scale: Tensor, zero: Tensor, bits: int, size: int, *, less: int) -> dict[str, Tensor]:
    return {
        "qweight": words(code.tolist(), bits).T.contiguous(),
        "qzeros": words((zero - less).T.tolist(), bits),
        "scales": scale.T.contiguous(),
        "g_idx": (torch.arange(code.shape[1]) // size).int(),
    }


def awq(code: Tensor, scale: Tensor, zero: Tensor) -> dict[str, Tensor]:
    def turned(values: Tensor) -> Tensor:  # [N, R] -> words of [R, N], eight columns in AWQ's order
        rows = values.T.reshape(values.shape[1], -1, 8)
        return words(rows[:, :, [0, 2, 4, 6, 1, 3, 5, 7]].flatten(1).tolist(), 4)

    return {"qweight": turned(code), "qzeros": turned(zero), "scales": scale.T.contiguous()}


def compressed(code: Tensor, scale: Tensor, zero: Tensor, bits: int, *, sym: bool) -> dict[str, Tensor]:
    tensors = {
        "weight_packed": words(code.tolist(), bits),
        "weight_scale": scale.bfloat16(),
        "weight_shape": torch.tensor(code.shape),
    }
    return tensors if sym else {**tensors, "weight_zero_point": words(zero.T.tolist(), bits).T.contiguous()}


def settings_of(kind: str, bits: int, size: int, *, sym: bool) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "symmetric": sym, "strategy": "group", "group_size": size}
    return {
        "gptq": {"quant_method": "gptq", "bits": bits, "group_size": size, "desc_act": False, "sym": sym},
        "gptq_v2": {"quant_method": "gptq", "bits": bits, "group_size": size, "checkpoint_format": "gptq_v2"},
        "awq": {"quant_method": "awq", "bits": bits, "group_size": size, "zero_point": True, "version": "gemm"},
        "compressed-tensors": {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
            "ignore": ["lm_head"],
        },
    }[kind]


def write_foreign(
    source: Path, folder: Path, kind: str, *, bits: int = 4, size: int = 32, sym: bool = True
) -> dict[str, Tensor]:
    """`source`, a Llama in one file, with its linears as `kind` has them; name of a linear -> what it means, fp64."""
    shutil.copytree(source, folder)
    state = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    means = {}
    names = [f"model.layers.{block}.{name}" for block in range(config["num_hidden_layers"]) for name in LAYERS]
    for seed, name in enumerate(names):
        N, K = state.pop(f"{name}.weight").shape
        code, scale, zero = random_layer(N, K, bits, size, sym=sym, seed=seed)
        if kind == "awq":
            parts = awq(code, scale, zero)
        elif kind == "compressed-tensors":
            parts = compressed(code, scale, zero, bits, sym=sym)
            scale = parts["weight_scale"]
        else:
            parts = gptq(code, scale, zero, bits, size, less=int(kind == "gptq"))
        state |= {f"{name}.{key}": tensor for key, tensor in parts.items()}
        means[name] = meaning(code, scale, zero, size)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    config["quantization_config"] = settings_of(kind, bits, size, sym=sym)
    (folder / "config.json").write_text(json.dumps(config))
    return means
