"""What planes for the output head and the embedding cost: nll and divergence by solver and bits, and the size.

Only the head and the embedding are quantized, everything else stays as it is. Solvers: round-to-nearest, BCQ from a
greedy start, the clipped grid, and the clipped grid refined (what `--head-bits` does, solvers/clipped.py).

    python benchmarks/head_bits.py MODEL --text FILE [--bits 4,6,8] [--group-size N] [--max-tokens N] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from bitstrata.benchmark.machine import describe
from bitstrata.calibration import evaluation_windows, read_text
from bitstrata.metrics import Tally
from bitstrata.models import context_limit, find_head, load_tokenizer
from bitstrata.planes import PlaneWeight, decode
from bitstrata.plans import parse_bits
from bitstrata.quantization.stages import CHUNK
from bitstrata.solvers import BCQ, RTN
from bitstrata.solvers.clipped import clipped_grid, clipped_rows
from bitstrata.solvers.grouping import Grouping, affine_weight, join_rows, row_chunks


def clipped(weight: Tensor, bits: int, group_size: int) -> PlaneWeight:
    grouping = Grouping.of(weight, group_size)
    planes, scale, offset = clipped_grid(grouping.split(weight), grouping.mask(weight.device), bits)
    return affine_weight(grouping, planes > 0, {bits: (scale, offset)})


SOLVERS: dict[str, Callable[[Tensor, int, int], PlaneWeight]] = {
    "rtn": lambda weight, bits, group: RTN().solve_rows(weight, (bits,), group),
    "bcq from greedy": lambda weight, bits, group: BCQ().solve_rows(weight, (bits,), group),
    "clipped grid": clipped,
    "clipped grid, refined": clipped_rows,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", required=True)
    parser.add_argument("--bits", default="4,6,8")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=20_000)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    length = min(2048, context_limit(model.config) or 2048)
    tokenizer, documents = load_tokenizer(arguments.model), read_text(arguments.text, part="heldout")
    windows = [torch.tensor([ids]) for ids in evaluation_windows(tokenizer, documents, length, arguments.max_tokens)]
    parameters = {layer.name: model.get_submodule(layer.name).weight for layer in find_head(model)}
    originals = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    def measure() -> tuple[Tally, Tally]:
        """Of the original, and of what the parameters hold now, compared with it."""
        base, now = Tally(), Tally()
        current = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        with torch.no_grad():
            for ids in windows:
                logits = []
                for values in (originals, current):
                    for name, parameter in parameters.items():
                        parameter.copy_(values[name])
                    logits.append(model(ids).logits[0, :-1])
                base.add(logits[0], ids[0, 1:])
                now.add(logits[1], ids[0, 1:], logits[0])
        return base, now

    rows = []
    for bits in parse_bits(arguments.bits):
        for name, solve in SOLVERS.items():
            stored = 0
            for layer, original in originals.items():
                chunks = row_chunks(len(original), original.shape[1], CHUNK)
                planes = join_rows([solve(original[part], bits, arguments.group_size) for part in chunks])
                stored += sum(tensor.nbytes for tensor in planes.tensors().values())
                parameters[layer].data.copy_(decode(planes, bits))
            base, now = (tally.result() for tally in measure())
            rows.append({"bits": bits, "solver": name, "nll": now.nll - base.nll, "kld": now.kld, "bytes": stored})
            print(f"{bits} bits, {name}: nll {now.nll - base.nll:+.5f}, kld {now.kld:.6f}, {stored} bytes", flush=True)
    dense = sum(value.numel() * 2 for value in originals.values())
    print(f"{arguments.model.name}: nll {base.nll:.5f} on {base.tokens} tokens, bf16 {dense} bytes")
    if arguments.json:
        settings = {
            "model": arguments.model.name,
            "text": Path(arguments.text).name,
            "tokens": base.tokens,
            "group_size": arguments.group_size,
            "nll": base.nll,
            "bf16_bytes": dense,
        }
        result = {"machine": describe(torch.get_num_threads()), "settings": settings, "results": rows}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
