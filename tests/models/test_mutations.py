"""A mutated checkpoint is refused by name, or computes what it did before; else it says what is different.

MUTANTS=<n> tries so many; TEST_SEED=<n> repeats a run.
"""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_llama

import bitstrata
from bitstrata.errors import BitstrataError
from bitstrata.progress import notes, own_notes

MUTANTS = int(os.environ.get("MUTANTS", 200))
INDEX, CONFIG, GENERATION = "model.safetensors.index.json", "config.json", "generation_config.json"
IDS = torch.tensor([[5, 9, 33, 2, 17]])
VALUES = (
    None, True, False, 0, 1, -1, 2, 3, 64, 70, 2**31, 20_000, 10**30, -(10**9), 0.5, -0.0, 1e308, float("nan"), "", "x",
    "\ud800", "float32", "int8", "../x", [], [9], [[1]], {}, {"a": 1}, {"rope_type": "yarn"}, [None] * 3,
)  # fmt: skip

# what such files hold besides tokens
GENERATION_VALUES = {
    "do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1,
    "max_length": 64, "min_new_tokens": 1, "no_repeat_ngram_size": 3, "eos_token_id": [1, 2], "pad_token_id": 1,
    "num_beams": 1, "suppress_tokens": [4], "bad_words_ids": [[7, 8]], "length_penalty": 1.0, "epsilon_cutoff": 0.0,
}  # fmt: skip

Draw = random.Random


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mutations")
    source = tiny_llama(
        folder / "source", hidden_size=32, intermediate_size=48, num_attention_heads=2, num_hidden_layers=2
    )
    bitstrata.quantize(source, folder / "out", bits="2-3", method="rtn", group_size=32)
    assert (folder / "out" / GENERATION).exists()
    values = json.loads((folder / "out" / GENERATION).read_text())
    (folder / "out" / GENERATION).write_text(json.dumps(values | GENERATION_VALUES))
    return folder / "out"


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) inside a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, item in inside for place in [(value, key), *places(item)]]


def edit_value(text: bytes, draw: Draw) -> bytes:
    """JSON with one value replaced, dropped, renamed, exchanged with another's or wrapped."""
    value = json.loads(text)
    found = places(value)
    container, key = draw.choice(found)
    other, place = draw.choice(found)
    match draw.randrange(6):
        case 0 | 1:
            container[key] = draw.choice(VALUES)
        case 2:
            container.pop(key)
        case 3:
            container[key] = copy.deepcopy(other[place])
        case 4 if isinstance(container, dict):
            container[draw.choice(["x", key.upper(), key + "2", "layers", "dtype"])] = container.pop(key)
        case _:
            for _ in range(draw.choice([1, 2, 90, 2000])):
                container[key] = [container[key]]
    return dumps(value)


def dumps(value: Any) -> bytes:
    """JSON of any depth: the library's own writer gives up at a thousand levels."""
    if isinstance(value, dict):
        return b"{" + b",".join(json.dumps(key).encode() + b":" + dumps(item) for key, item in value.items()) + b"}"
    depth = 0
    while isinstance(value, list) and len(value) == 1:
        value, depth = value[0], depth + 1
    inner = b"[" + b",".join(map(dumps, value)) + b"]" if isinstance(value, list) else None
    if inner is None:
        inner = dumps(value) if isinstance(value, dict) else json.dumps(value).encode()
    return b"[" * depth + inner + b"]" * depth


def edit_bytes(text: bytes, draw: Draw) -> bytes:
    """One bit flipped, or a stretch dropped, doubled or overwritten."""
    at, length = draw.randrange(len(text)), draw.choice([1, 3, 40])
    match draw.randrange(4):
        case 0:
            return text[:at] + text[at + length :]
        case 1:
            return text[: at + length] + text[at:]
        case 2:
            return text[:at] + draw.randbytes(length) + text[at + length :]
    return text[:at] + bytes([text[at] ^ 1 << draw.randrange(8)]) + text[at + 1 :]


def edit_header(content: bytes, draw: Draw) -> bytes:
    """A safetensors file whose header was changed; its length is right half of the time."""
    length = int.from_bytes(content[:8], "little")
    header = draw.choice([edit_value, edit_bytes])(content[8 : 8 + length], draw)
    announced = len(header) if draw.random() < 0.5 else length
    return announced.to_bytes(8, "little") + header + content[8 + length :]


def edit_data(content: bytes, draw: Draw) -> bytes:
    """A safetensors file with one bit of its tensors flipped, or cut, or lengthened."""
    start = 8 + int.from_bytes(content[:8], "little")
    if start == len(content) or draw.random() < 0.2:
        return draw.choice([content[: draw.randrange(len(content))], content + b"\0"])
    at = draw.randrange(start, len(content))
    return content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]


def mutate(folder: Path, draw: Draw) -> tuple[str, bool]:
    """Change one file of `folder`; returns what was done, and whether a digest of a file was made wrong by it."""
    if draw.random() < 0.25:
        path = draw.choice(sorted(folder.glob("*.safetensors")))
        change: Callable[[bytes, Draw], bytes] = draw.choice([edit_header, edit_data])
    else:
        path = folder / draw.choice([CONFIG, CONFIG, INDEX, GENERATION])
        change = draw.choice([edit_value, edit_value, edit_bytes])
    before = path.read_bytes()
    after = change(before, draw)
    path.unlink()
    path.write_bytes(after)
    return f"{path.name} {change.__name__}", path.suffix == ".safetensors" and before != after


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.stack([model(IDS, bits=bits).logits for bits in (2, 3)])


@own_notes()
def fault(folder: Path, draw: Draw, expected: torch.Tensor) -> str | None:
    """What is wrong with how a mutated checkpoint is taken; None if nothing, "refused" for a proper refusal."""
    what, is_damaged = mutate(folder, draw)
    try:
        if draw.random() < 0.2:
            str(bitstrata.inspect(folder))
        model = bitstrata.load(folder, verify=is_damaged)
        if not torch.equal(logits(model), expected) and not any(CONFIG in note for note in notes()):
            return f"{what}: other logits without a word"
        if is_damaged:
            return f"{what}: loaded with another digest"
        bitstrata.generate(model, "ab", max_new_tokens=3)
    except BitstrataError as error:
        return f"{what}: {error.message}" if "ignore_mismatched_sizes" in error.message else "refused"
    except BaseException as error:
        return f"{what}: {error!r}"
    return None


def test_mutants_are_refused_or_say_what_is_different_or_compute_the_same(good, tmp_path, seed):
    expected = logits(bitstrata.load(good))
    found: dict[int, str | None] = {}
    for number in range(MUTANTS):
        folder = Path(shutil.copytree(good, tmp_path / f"{number}"))
        found[number] = fault(folder, random.Random(f"{seed} {number}"), expected)
        shutil.rmtree(folder)
    faults = {number: what for number, what in found.items() if what not in (None, "refused")}
    assert not faults, "\n".join(f"mutant {number} of seed {seed}: {what}" for number, what in faults.items())
    assert MUTANTS / 3 < list(found.values()).count("refused") < MUTANTS
