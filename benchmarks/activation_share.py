"""How much of a quantized model's divergence the kernels' int8 activations and byte levels make, at each bits.

Every linear layer but the output head is quantized here, in memory, by a method that needs no data. KL divergence from
the original over windows of a text, in float32 otherwise: `exact` with the decoded weights, `int8` as the kernels
compute; the share is what int8 adds, in percent of exact. Where it exceeds 20, the kernels cost more than they should.

    python benchmarks/activation_share.py MODEL --text FILE [--bits 2-8] [--method rtn] [--windows 4] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitstrata.benchmark.machine import describe
from bitstrata.kernels import pack
from bitstrata.solvers import METHODS

LENGTH = 256  # tokens of a window


class Quantized(nn.Module):
    """A linear layer that computes at `bits` in `arithmetic`."""

    bits = 0
    arithmetic = "exact"

    def __init__(self, linear: nn.Linear, method: str, bits: tuple[int, ...], group_size: int) -> None:
        super().__init__()
        self.weight = pack(METHODS[method]().solve_rows(linear.weight.detach().float(), bits, group_size))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        y = self.weight.linear(x, Quantized.bits, Quantized.arithmetic)
        return y if self.bias is None else y + self.bias


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--bits", default="2-8")
    parser.add_argument("--method", default="rtn", choices=("rtn", "bcq"))
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    low, _, high = arguments.bits.partition("-")
    bits = tuple(range(int(low), int(high or low) + 1))

    tokens = AutoTokenizer.from_pretrained(arguments.model)(
        arguments.text.read_text()[: 20 * LENGTH * arguments.windows]
    )
    ids = torch.tensor(tokens["input_ids"][: LENGTH * arguments.windows]).view(-1, LENGTH)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    results = []
    with torch.no_grad():
        original = torch.cat([model(window[None]).logits for window in ids]).log_softmax(-1)
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and "lm_head" not in name:
                model.set_submodule(name, Quantized(module, arguments.method, bits, arguments.group_size))
        for Quantized.bits in bits:
            found = {}
            for Quantized.arithmetic in ("exact", "int8"):
                log_q = torch.cat([model(window[None]).logits for window in ids]).log_softmax(-1)
                found[Quantized.arithmetic] = (original.exp() * (original - log_q)).sum(-1).mean().item()
            share = 100 * (found["int8"] / found["exact"] - 1)
            results.append({"bits": Quantized.bits, **found, "share": share})
            print(f"{Quantized.bits} bits: exact {found['exact']:.5f}, int8 {found['int8']:.5f}, share {share:+.1f} %")
    if arguments.json:
        settings = {"model": Path(arguments.model).name, "text": arguments.text.name, "method": arguments.method}
        report = {"machine": describe(torch.get_num_threads()), "settings": settings, "results": results}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
