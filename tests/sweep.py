"""One architecture, tiny and random, through the whole of bitstrata: quantized, loaded, compared, and generated with.

tools/models_page.py makes docs/reference/models.md of it; the tests compare that page with what they find.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from helpers import with_decoded_weights
from shrunk import randomized, shrunk
from tiny_models import tiny_tokenizer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

import bitstrata
from bitstrata.errors import BitstrataError
from bitstrata.models import load_tokenizer
from bitstrata.models.config import causal_class
from bitstrata.nn import bits_state

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "models.md"
BITS, GROUP = (2, 3, 4, 8), 16
PROMPT, NEW_TOKENS = "a cat and a dog ", 12
# why a row has no model: it is none of text, or none could be made by the rules of shrunk.py
NO_TEXT_MODEL = ("an encoder-decoder", "sees later tokens", "cannot be given text alone", "not a causal language model")
UNMADE = "not tried: transformers makes no tiny one of its default config here"


@dataclass(frozen=True)
class Outcome:
    """A row of the table; `why` it does not work is empty if it does."""

    name: str
    kind: str
    why: str = ""
    quantized: tuple[str, ...] = ()
    kept: tuple[tuple[str, str], ...] = ()

    @property
    def status(self) -> str:
        """In a word: yes, not yet, no (there is no language model of text alone), or -."""
        if not self.why or self.why == UNMADE:
            return "-" if self.why else "yes"
        return "no" if any(words in self.why for words in NO_TEXT_MODEL) else "not yet"

    def __str__(self) -> str:
        if self.why:
            return f"| {self.name} | {self.kind or '-'} | {self.status} | {self.why} | |"
        reasons: dict[str, list[str]] = {}
        for part, reason in self.kept:
            reasons.setdefault(reason, []).append(part)
        kept = "; ".join(f"{', '.join(parts)} ({reason})" for reason, parts in reasons.items())
        return f"| {self.name} | {self.kind} | yes | {', '.join(self.quantized)} | {kept} |"


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
    has_experts = any(".experts." in name for name in ours.state_dict())  # a router that nearly ties picks others
    assert gaps[8] < (0.25 if has_experts else 0.15), f"logits at 8 bits are {gaps[8]:.3f} away"
    assert gaps[8] < gaps[2], "8 bits are no better than 2"
    later = ids.clone()
    later[:, -1] = (ids[:, -1] - 3 + 41) % 57 + 3
    torch.testing.assert_close(_logits(source, later)[:, :-1], exact[:, :-1], rtol=1e-3, atol=1e-3)
    tokenizer = load_tokenizer(folder / "out")
    prompt = torch.tensor([tokenizer(PROMPT).input_ids])
    if not _generates(source, prompt):
        return
    # in exact arithmetic, so that what nearly ties comes out the same in steps of other lengths
    with bits_state(ours).using(4, "exact"):
        said = bitstrata.generate(ours, PROMPT, bits=4, max_new_tokens=NEW_TOKENS)
    with bits_state(theirs).using(4, "exact"):
        whole = _continued(theirs, prompt)
    expected = tokenizer.decode(whole[prompt.shape[1] :], skip_special_tokens=True)
    assert said.text == expected, f"{said.text!r} is not {expected!r}"


def _generates(model: Any, prompt: torch.Tensor) -> bool:
    """Whether transformers' own steps continue `prompt` as whole passes of `model` do; of some architectures not."""
    try:
        whole = _continued(model, prompt)
    except Exception:
        return False
    return torch.equal(_logits(model, whole[None, :-1])[0, prompt.shape[1] - 1 :].argmax(-1), whole[prompt.shape[1] :])


def _continued(model: Any, prompt: torch.Tensor, **more: Any) -> torch.Tensor:
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": 1}
    with torch.no_grad():
        whole: torch.Tensor = model.generate(prompt, **settings, **more)[0]
    return whole


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


def rows_of(page: str) -> dict[str, str]:
    """Architecture -> its row in the page."""
    return {line.split(" | ")[0].removeprefix("| "): line for line in page.splitlines() if line.startswith("| ")}
