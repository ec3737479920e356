"""A model run forward and backward, block by block, with weights that are made when a block needs them.

A forward pass keeps the hidden states before each block and nothing else. The backward pass takes the blocks from the
last to the first, runs each again on what it read, and differentiates that run (activation checkpointing). So memory is

    what lies outside the blocks and what of them is not made, fp32
    + the hidden states before each block
    + one block's made weights, the largest of their derivatives, and its activations,

whatever the number of blocks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from .block_runner import BlockRunner, Ends, arithmetic

# the index of a block -> parameter name -> its weights
Made = Callable[[int], Mapping[str, Tensor]]


class BlockwiseModel:
    """A model that runs as above; see `open_blockwise`. Hidden states are fp32 [b, S, hidden] on the runner's device.

    ends: what the model does before the blocks and after them.
    products: the dtype in which the blocks' linears multiply: of inputs, weights and results; sums are fp32.
    """

    def __init__(self, runner: BlockRunner, blocks: Sequence[nn.Module], ends: Ends, products: torch.dtype) -> None:
        self.ends, self.products = ends, products
        self.device = runner.device
        self.vocabulary = int(runner.model.config.get_text_config(decoder=True).vocab_size)
        self._runner, self._blocks = runner, blocks

    def forward(self, hidden: Tensor, made: Made, products: torch.dtype | None = None) -> Iterator[Tensor]:
        """Hidden states after each block; `products` other than usual."""
        for index in range(len(self._blocks)):
            with torch.no_grad(), self._with(index, made(index)) as block:
                hidden = self._call(index, block, hidden, products or self.products)
            yield hidden

    def backward(
        self,
        states: list[Tensor],
        gradient: Tensor,
        made: Made,
        found: Callable[[int, str, Tensor], None],
        done: Callable[[int], None],
    ) -> None:
        """Differentiate a forward pass.

        Args:
            states: the hidden states before each block; they are taken out of the list.
            gradient: the derivatives of the hidden states after the last block.
            found: called with a block's index, the name of a made weight that was used, and its derivatives, which are
                then dropped.
            done: called with the index of a block whose derivatives have all been found.
        """
        for index in reversed(range(len(self._blocks))):
            hidden = states.pop().detach().requires_grad_(index > 0)
            with self._with(index, made(index), lambda *of, index=index: found(index, *of)) as block:
                output = self._call(index, block, hidden, self.products)
                if output.requires_grad:
                    output.backward(gradient)
            if hidden.grad is not None:
                gradient = hidden.grad
            done(index)

    def _call(self, index: int, block: nn.Module, hidden: Tensor, products: torch.dtype) -> Tensor:
        with arithmetic(hidden.device, products):
            return self._runner.call(index, block, hidden).float()

    @contextlib.contextmanager
    def _with(
        self, index: int, weights: Mapping[str, Tensor], found: Callable[[str, Tensor], None] | None = None
    ) -> Iterator[nn.Module]:
        """Block `index` with these weights, differentiable if somebody wants what is `found`, and then without them."""
        block, prefix = self._blocks[index], f"{self._runner.discovery.blocks[index]}."
        places = {name: block.get_submodule(name.removeprefix(prefix).rpartition(".")[0]) for name in weights}
        before = {name: module._parameters["weight"] for name, module in places.items()}
        try:
            for name, module in places.items():
                module._parameters["weight"] = parameter = nn.Parameter(weights[name], requires_grad=found is not None)
                if found is not None:
                    parameter.register_post_accumulate_grad_hook(_hand_over(name, found))
            yield block
        finally:
            for name, module in places.items():
                module._parameters["weight"] = before[name]


def _hand_over(name: str, found: Callable[[str, Tensor], None]) -> Callable[[Tensor], None]:
    """A hook that gives a weight's derivatives away as soon as they are there, so that one weight's are at a time."""

    def hook(parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient, parameter.grad = parameter.grad, None
        found(name, gradient)

    return hook


@contextlib.contextmanager
def open_blockwise(
    runner: BlockRunner, made: Collection[str], windows: Tensor, products: torch.dtype = torch.float32
) -> Iterator[BlockwiseModel]:
    """Everything of a model in memory but the weights that are made.

    Args:
        made: the names of these parameters; each is called weight.
        windows: tokens int64 [n, S] of a text, for learning what blocks are called with; the first two are looked at.
    """
    hidden = runner.embed(windows[:2])
    with runner.block(0) as block:
        runner.run(0, block, hidden)
    with contextlib.ExitStack() as stack:
        ends = stack.enter_context(runner.ends())
        blocks = [stack.enter_context(runner.block(index, made)) for index in range(len(runner.discovery.blocks))]
        yield BlockwiseModel(runner, blocks, ends, products)
