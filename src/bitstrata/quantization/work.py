"""How much work a job does: multiplications and additions of its products, which duration.py turns into time.

Attention is counted over whole windows, as wide as hidden states. What goes over numbers one by one, such as softmax
over the vocabulary or the decoding of planes, is bound by memory: a number that is read and written counts as EACH
operations in fp32. The counts were fitted to a profile of SmolLM2-135M on two cores (benchmarks/quantize_speed.py).
"""

from __future__ import annotations

from ..models.experts import experts_of
from .context import Prepared
from .expert_inputs import PASSED_ON

EACH = 100.0
IN_SOFTMAX = 8  # how often a divergence goes over the logits of both distributions
IN_PASS = 4  # how often a pass goes over what linears read and return: norms, activations, casts, to a file and back


def of_blocks(prepared: Prepared) -> float:
    """One token through all blocks."""
    linears = sum(
        2.0 * one.in_features * one.out_features * prepared.shares[one.name] for one in prepared.discovery.linears
    )
    return linears + 4.0 * len(prepared.discovery.blocks) * prepared.settings.seq_len * prepared.hidden_size


def of_numbers(prepared: Prepared) -> float:
    """What a token takes in all blocks beside products."""
    widths = ((one.in_features + one.out_features) * prepared.shares[one.name] for one in prepared.discovery.linears)
    return EACH * IN_PASS * sum(widths)


def of_head(prepared: Prepared) -> float:
    """One token's logits."""
    return 2.0 * prepared.vocabulary * prepared.hidden_size


def of_divergence(prepared: Prepared) -> float:
    """What a token's divergence takes beside its logits."""
    return EACH * IN_SOFTMAX * prepared.vocabulary


def of_moments(prepared: Prepared) -> float:
    """The moments of one token's inputs at one precision, without those of experts: H is half of a product, and both
    are slower by a third than torch's."""
    experts = _experts(prepared)
    inputs = {
        (one.name.rpartition(".")[0], one.in_features) for one in prepared.discovery.linears if one.name not in experts
    }
    return sum(4.0 * columns**2 for _, columns in inputs)


def of_solver(prepared: Prepared) -> float:
    """What the method does beside moments, with all linears."""
    method, settings = prepared.settings.method, prepared.settings
    rows: dict[tuple[str, int], int] = {}
    for one in prepared.discovery.linears:
        together = one.name.rpartition(".")[0], one.in_features
        rows[together] = rows.get(together, 0) + one.out_features
    solved = sum(method.operations(count, columns, settings.bits) for (_, columns), count in rows.items())
    return solved + 3 * method.learnt_tokens(settings.seq_len, settings.bits) * of_blocks(prepared)


def of_experts(prepared: Prepared, tokens: int) -> float:
    """The moments at one precision of what experts read, and what is run to know the inputs of their last linears."""
    experts, total = _experts(prepared), 0.0
    read: set[tuple[str, int]] = set()
    layers: set[tuple[str, int]] = set()
    for one in prepared.discovery.linears:
        if one.name not in experts:
            continue
        expert, _, name = one.name.rpartition(".")
        routed = tokens * prepared.shares[one.name]
        if name == "down_proj":  # also of some of the layer's inputs
            rows = routed + min(tokens, PASSED_ON * one.in_features)
            total += rows * 4.0 * one.in_features**2
        else:
            rows = routed + min(tokens, PASSED_ON * one.out_features)
            total += rows * 2 * 2.0 * one.in_features * one.out_features  # the original's and the quantized one's
            if (expert, one.in_features) not in read:
                read.add((expert, one.in_features))
                total += routed * 4.0 * one.in_features**2
            layers.add((expert.rpartition(".")[0], one.in_features))
    return total + sum(tokens * 4.0 * columns**2 for _, columns in layers)


def _experts(prepared: Prepared) -> set[str]:
    return set(experts_of((one.name for one in prepared.discovery.linears), prepared.model))
