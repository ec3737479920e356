"""Ways to damage a checkpoint; each is a function of its folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from bitstrata.checkpoint import CheckpointReader

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"


def read_all(folder: Path, *, verify: bool = False) -> None:
    """Read every tensor of the checkpoint by every way there is."""
    reader = CheckpointReader(folder, verify=verify)
    for tensor in reader.state_dict().values():
        tensor.clone()
    for layer in reader.spec.layers:
        reader.layer(layer)


def replace_file(path: Path, data: bytes) -> None:
    """Write `data` as a new file: readers may still have the old one mapped."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def edit_json(file, change):
    def damage(folder):
        value = json.loads((folder / file).read_text())
        change(value)
        replace_file(folder / file, json.dumps(value).encode())

    return damage


def edit_spec(change):
    """Change the quantization_config."""
    return edit_json(CONFIG, lambda config: change(config["quantization_config"]))


def edit_index(change):
    return edit_json(INDEX, change)


def set_field(name, value):
    return edit_spec(lambda spec: spec.update({name: value}))


def set_layer(name, value, layer="a"):
    return edit_spec(lambda spec: spec["layers"][layer].update({name: value}))


def drop_field(name):
    return edit_spec(lambda spec: spec.pop(name))


def write(file, data):
    return lambda folder: replace_file(folder / file, data)


def edit_tensor(name, change):
    """Rewrite tensor `name` as change(tensor), or drop it where that is None; the digests no longer fit."""

    def damage(folder):
        file = json.loads((folder / INDEX).read_text())["weight_map"][name]
        tensors = {key: value.clone() for key, value in load_file(folder / file).items()}
        changed = change(tensors.pop(name))
        if changed is not None:
            tensors[name] = changed.contiguous()
        (folder / file).unlink()
        save_file(tensors, folder / file)

    return damage


def forget_digests(folder: Path) -> None:
    edit_index(lambda index: index["metadata"].pop("sha256"))(folder)


def with_first(value):
    """The first element of a tensor replaced by `value`."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[0] = value
        return tensor

    return change
