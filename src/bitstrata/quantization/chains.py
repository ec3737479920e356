"""Hidden states, carried from block to block: a chain for the original and one for each precision.

There are two sets of chains, over different windows: `learning`, what methods learn from, and `checking`, held out for
the final check. Held-out windows have also a chain of dedicated round-to-nearest at each bits, to compare with. All but
the original begin and end in the quantized embedding and head, where these are quantized.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from ..calibration import BlockRunner

ORIGINAL = "original"  # the others are named "<bits>" and "rtn <bits>"


def baseline(bits: int) -> str:
    """The chain of dedicated round-to-nearest at `bits`."""
    return f"rtn {bits}"


class Chains:
    """The chains of one job, by name: hidden states fp32 [windows, seq_len, hidden]."""

    def __init__(self, runner: BlockRunner) -> None:
        self.runner = runner
        self.learning: dict[str, Tensor] = {}
        self.checking: dict[str, Tensor] = {}

    def start(self, names: Iterable[str], tokens: Tensor, embedding: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Chains before the first block; `embedding`: what all but the original's begin in, by parameter name."""
        original = quantized = self.runner.embed(tokens)
        if embedding:
            quantized = self.runner.embed(tokens, embedding)
        return {name: original if name == ORIGINAL else quantized for name in names}

    def advance(self, name: str, index: int, block: nn.Module) -> None:
        """Move a chain past block `index`, whose weights are those of the chain."""
        for chains in (self.learning, self.checking):
            if name in chains:
                chains[name] = self.runner.run(index, block, chains[name])
