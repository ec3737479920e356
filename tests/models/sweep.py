"""One architecture, tiny and random, through the whole of bitstrata: quantized, loaded, compared, and generated with.

`python tests/models/sweep.py` writes docs/reference/models.md, the table of what becomes of every architecture of the
installed transformers; the tests compare it with what they find.
"""

from __future__ import annotations

import re
import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from helpers import with_decoded_weights
from shrunk import randomized, shrunk
from tiny_models import tiny_tokenizer

import bitstrata
from bitstrata.errors import BitstrataError
from bitstrata.models import load_tokenizer
from bitstrata.models.config import causal_class

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "models.md"
BITS, GROUP = (2, 3, 4, 8), 16
PROMPT, NEW_TOKENS = "a cat and a dog ", 12
UNMADE = "no tiny one could be made"  # by the rules of shrunk.py: not our doing, and not tried

HEAD = """# Models

What becomes of every architecture of transformers {version} that writes text, tried with a tiny random model of it:
quantized at 2, 3, 4 and 8 bits, loaded by bitstrata and by transformers, compared with the original, and generated
with. A model that also sees or hears keeps those parts as they are. This page is written by
`python tests/models/sweep.py`, and a test compares it.

{works} of {tried} work. `*` in front of a name stands for the decoder blocks; what stands outside of them stays as it
is too (`--head-bits` quantizes the head and the embedding).

| architecture | class | quantized | stays as it is |
|---|---|---|---|
"""


@dataclass(frozen=True)
class Outcome:
    """A row of the table; `why` it does not work is empty if it does."""

    name: str
    kind: str
    why: str = ""
    quantized: tuple[str, ...] = ()
    kept: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        if self.why:
            return f"| {self.name} | {self.kind} | not yet | {self.why} |"
        reasons: dict[str, list[str]] = {}
        for part, reason in self.kept:
            reasons.setdefault(reason, []).append(part)
        kept = "; ".join(f"{', '.join(parts)} ({reason})" for reason, parts in reasons.items())
        return f"| {self.name} | {self.kind} | {', '.join(self.quantized)} | {kept or '-'} |"


def names() -> list[str]:
    """Every model type with a model that writes text, in order."""
    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES})


def build(name: str) -> tuple[Any, str]:
    """A tiny random model of `name`, of the class that sees and hears if there is one; and the name of that class."""
    config = shrunk(name)
    for mapping in (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        if name in mapping and hasattr(transformers, str(mapping[name])):
            config.architectures = [str(mapping[name])]
            break
    kind, own = causal_class(config)
    torch.manual_seed(0)
    return randomized(kind(own), 0), kind.__name__


def attempt(name: str, folder: Path) -> Outcome:
    """Take `name` through everything in `folder`. Raises AssertionError where a result is wrong."""
    try:
        original, kind = build(name)
    except Exception:
        return Outcome(name, "", UNMADE)
    original.save_pretrained(folder / "source")
    tiny_tokenizer().save_pretrained(folder / "source")
    try:
        report = bitstrata.quantize(folder / "source", folder / "out", bits=list(BITS), method="rtn", group_size=GROUP)
    except BitstrataError as error:
        return Outcome(name, kind, _reason(error))
    _compare(original, type(original), folder)
    spec = bitstrata.inspect(folder / "out").to_json()
    return Outcome(name, kind, "", _parts(layer["name"] for layer in spec["layers"]), _kept(report.left_out))


def _compare(original: Any, kind: Any, folder: Path) -> None:
    """The quantized model is what its decoded weights are, close to `original`, and generates as transformers does."""
    source = kind.from_pretrained(folder / "source").eval()
    ours = bitstrata.load(folder / "out")
    theirs = kind.from_pretrained(folder / "out").eval()
    ids = torch.randint(3, 60, (2, 16), generator=torch.Generator().manual_seed(0))
    exact = _logits(source, ids)
    assert torch.isfinite(exact).all()
    gaps = {}
    for bits in (2, 8):
        expected = _logits(with_decoded_weights(source, ours, bits), ids)
        with bitstrata.use_bits(ours, bits), bitstrata.use_bits(theirs, bits):
            found = _logits(ours, ids)
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
            assert torch.equal(_logits(theirs, ids), found), "transformers computes something else"
        gaps[bits] = float((found - exact).norm() / exact.norm())
    assert gaps[8] < 0.15, f"logits at 8 bits are {gaps[8]:.3f} away"
    assert gaps[8] < gaps[2], "8 bits are no better than 2"
    later = ids.clone()
    later[:, -1] = (ids[:, -1] - 3 + 41) % 57 + 3
    torch.testing.assert_close(_logits(source, later)[:, :-1], exact[:, :-1], rtol=1e-3, atol=1e-3)
    said = bitstrata.generate(ours, PROMPT, bits=4, max_new_tokens=NEW_TOKENS)
    tokenizer = load_tokenizer(folder / "out")
    prompt = torch.tensor([tokenizer(PROMPT).input_ids])
    with torch.no_grad():
        whole = theirs.generate(prompt, bits=4, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=1)
    expected = tokenizer.decode(whole[0, prompt.shape[1] :], skip_special_tokens=True)
    assert said.text == expected, f"{said.text!r} is not {expected!r}"


def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def _reason(error: BitstrataError) -> str:
    """The first problem, without the folder that it names."""
    problems = getattr(error, "problems", None) or [error]
    return re.sub(r"/\S*/(source|out)\b:?\s*", "", problems[0].message).replace("|", "/").strip()


def _parts(layers: Any) -> tuple[str, ...]:
    """The names of layers without the blocks' and without numbers, each once."""
    return tuple(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.|$)", "#", _local(name)) for name in layers))


def _local(name: str) -> str:
    return re.sub(r"^.*?\.\d+\.", "", name)


def _kept(left_out: Sequence[dict[str, Any]]) -> tuple[tuple[str, str], ...]:
    outside = ("embedding", "output head", "outside the decoder blocks", "tied")
    inside = [entry for entry in left_out if not entry["reason"].startswith(outside)]
    parts = [(_parts([entry["name"].removesuffix(".weight")])[0], entry["reason"]) for entry in inside]
    return tuple(dict.fromkeys(parts))


def tried(name: str) -> Outcome:
    """`attempt` in a folder of its own; a failure is a row that says so."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        try:
            return attempt(name, Path(folder))
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            said = " ".join([str(frame.line), *str(error).split()])[:300]
            return Outcome(name, "?", f"FAILED {type(error).__name__}: {said}")


def rows_of(page: str) -> dict[str, str]:
    """Architecture -> its row in the page."""
    found = (line for line in page.splitlines() if line.startswith("| ") and not line.startswith("| architecture"))
    return {line.split(" | ")[0].removeprefix("| "): line for line in found}


def main(chosen: Sequence[str]) -> None:
    with Pool(2) as pool:
        outcomes = list(pool.imap(tried, chosen or names(), chunksize=1))
    made = [outcome for outcome in outcomes if outcome.why != UNMADE]
    works = [outcome for outcome in made if not outcome.why]
    page = HEAD.format(version=transformers.__version__, works=len(works), tried=len(made))
    page += "\n".join(map(str, outcomes)) + "\n"
    if chosen:
        print(page)
    else:
        PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
