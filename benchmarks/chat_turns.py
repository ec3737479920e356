"""The second turn of a chat with a long history: how long until its first token, and what reuse across bits costs.

    python benchmarks/chat_turns.py OUT --text TEXT [--history 2000] [--bits 4] [--written 2,3] [--rounds 5]

Two tables, each from one run of one machine:

* **time to the first token** of a turn whose prompt has `history` tokens, and of the next one, which adds `turn` tokens
  and the reply between them: with the cache of the turn before ("equal") and with none of it ("off"), taking turns.
* **reuse across bits** ("any"): nll and KLD (to the same tokens computed at `bits` alone) of the `scored` tokens of a
  text after `history` tokens whose keys and values other bits wrote, over several stretches of the text.

Results go to a JSON file with machine, versions and settings.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

import bitstrata
from bitstrata.benchmark.machine import describe
from bitstrata.calibration import read_text
from bitstrata.models import load_tokenizer
from bitstrata.nn import bits_state
from bitstrata.runtime import GenerationSettings, continue_tokens
from bitstrata.tables import render


def first_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: list[int], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Seconds to the first token of a turn and of the next, with and without what the first one left."""
    state, settings = bits_state(model), GenerationSettings(arguments.reply)
    times: dict[str, list[float]] = {"first": [], "second": [], "second without": []}
    reused = []

    def turn(prompt: list[int], reuse: str) -> tuple[float, str, int]:
        made = continue_tokens(
            model, tokenizer, prompt, "", bits=state.resolve(arguments.bits), settings=settings, reuse=reuse
        )
        assert made.first_token_seconds is not None
        return made.first_token_seconds, made.text, made.reused_tokens

    turn(ids[:64], "off")  # makes the session, which is once a model
    for start in range(arguments.rounds):
        history = ids[start : start + arguments.history]
        seconds, reply, _ = turn(history, "equal")  # begins with another token than the round before
        times["first"].append(seconds)
        said = tokenizer.encode(reply, add_special_tokens=False)
        following = [*history, *said, *ids[-arguments.turn - start : len(ids) - start]]
        seconds, with_cache, count = turn(following, "equal")
        times["second"].append(seconds)
        reused.append(count)
        seconds, without, _ = turn(following, "off")
        times["second without"].append(seconds)
        print(f"round {start + 1}: same reply {with_cache == without}")
    found: dict[str, Any] = {name: statistics.median(values) for name, values in times.items()}
    return found | {"reused_tokens": statistics.median(reused), "share": found["second"] / found["first"]}


def across_bits(model: PreTrainedModel, ids: list[int], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What it costs that other bits wrote the history: of all stretches of the text together."""
    length = arguments.history + arguments.scored
    stretches = [ids[at : at + length] for at in range(0, len(ids) - length + 1, length)][: arguments.stretches]
    rows = []
    for written in (arguments.bits, *map(int, arguments.written.split(","))):
        losses, divergences, agreed = [], [], []
        for stretch in stretches:
            expected = after(model, stretch, arguments.bits, arguments)
            found = expected if written == arguments.bits else after(model, stretch, written, arguments)
            following = torch.tensor(stretch[arguments.history + 1 :])
            losses.append(-found[:-1].gather(1, following[:, None]).mean())
            divergences.append((expected.exp() * (expected - found)).sum(-1).mean())
            agreed.append((expected.argmax(-1) == found.argmax(-1)).float().mean())
        whole = [
            -after(model, stretch, written, arguments, written)[:-1]
            .gather(1, torch.tensor(stretch[arguments.history + 1 :])[:, None])
            .mean()
            for stretch in stretches
        ]
        rows.append(
            {
                "written": written,
                "bits": arguments.bits,
                "nll": float(torch.stack(losses).mean()),
                "kld": float(torch.stack(divergences).mean()),
                "top1_agreement": float(torch.stack(agreed).mean()),
                "nll_at_written_alone": float(torch.stack(whole).mean()),
            }
        )
    return rows


@torch.no_grad()
def after(
    model: PreTrainedModel, tokens: list[int], written: int, arguments: argparse.Namespace, bits: int | None = None
) -> Tensor:
    """Log-probabilities [scored, V] after each token behind the history, which `written` bits wrote."""
    cache = DynamicCache(config=model.config)
    history, scored = torch.tensor([tokens[: arguments.history]]), torch.tensor([tokens[arguments.history :]])
    model(history, past_key_values=cache, use_cache=True, bits=written, logits_to_keep=1)
    at = arguments.bits if bits is None else bits
    logits: Tensor = model(scored, past_key_values=cache, use_cache=True, bits=at).logits
    return logits[0].double().log_softmax(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--text", required=True)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--written", default="2,3")
    parser.add_argument("--history", type=int, default=2000, help="tokens of the first turn's prompt")
    parser.add_argument("--turn", type=int, default=24, help="tokens of the second turn")
    parser.add_argument("--reply", type=int, default=16, help="tokens of a reply")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scored", type=int, default=128)
    parser.add_argument("--stretches", type=int, default=6)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--skip", choices=["times", "bits"], help="leave one of the two tables out")
    parser.add_argument("--output", type=Path, help="a JSON file; tables it has already and that were left out stay")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    model = bitstrata.load(arguments.checkpoint, dtype=getattr(torch, arguments.dtype))
    tokenizer = load_tokenizer(Path(arguments.checkpoint))
    text = "\n".join(read_text(arguments.text, part="text"))
    ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    tables: dict[str, Any] = {}
    if arguments.skip != "times":
        times = tables["first_token"] = first_tokens(model, tokenizer, ids, arguments)
        cells = [[name, f"{1e3 * times[name]:.1f}"] for name in ("first", "second", "second without")]
        print(render(f"ms to the first token, {arguments.history} tokens of history", ["turn", "ms"], cells))
        print(f"second / first: {times['share']:.1%}; {times['reused_tokens']:.0f} tokens reused")
    if arguments.skip != "bits":
        rows = tables["across_bits"] = across_bits(model, ids, arguments)
        names = ["written", "bits", "nll", "kld", "top1_agreement", "nll_at_written_alone"]
        cells = [
            [f"{row[name]:.4f}" if isinstance(row[name], float) else str(row[name]) for name in names] for row in rows
        ]
        print(render("history that other bits wrote", names, cells))
    if arguments.output:
        known = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
        settings = {**vars(arguments), "checkpoint": Path(arguments.checkpoint).name, "text": Path(arguments.text).name}
        del settings["output"], settings["skip"]
        machine = describe(torch.get_num_threads(), torch.device("cpu"))
        result = known | {"settings": settings, "machine": machine} | tables
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
