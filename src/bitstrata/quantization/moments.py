"""Second moments of what a block's linears read, stage by stage.

A linear sees at p bits the inputs X_p that the model quantized so far produces, and should give
there what the original gives on its own inputs X. With n tokens as rows,

    || X_p Q^T - X W^T ||^2 / n = || (Q - W*) H^{1/2} ||^2 + const,
    H = X_p^T X_p / n,   C = X^T X_p / n,   W* = W C H^-1

so a solver needs H and the corrected target W* (asymmetric calibration; GPTAQ, arXiv 2504.02692).
H is damped; with damping d, C is damped alike, so that W* = W where the two chains agree.

Linears that read one tensor form a stage. Stages are solved in the order in which the block runs
them, each seeing the quantized weights of those before it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import ModelError
from .method import BlockTask

WINDOWS_A_BATCH = 4


class _Reached(Exception):  # noqa: N818  (not an error: the part of the block that was wanted has run)
    pass


@dataclass(frozen=True)
class Moments:
    """hessian H and cross C, fp32 [K, K], of `tokens` inputs of width K, not damped."""

    hessian: Tensor
    cross: Tensor
    tokens: int

    def damping(self, share: float) -> float:
        """`share` of the mean of H's diagonal; 1 if nothing ever reached the layer."""
        mean = float(self.hessian.diagonal().mean())
        return share * mean if mean > 0 else 1.0

    def damped(self, share: float) -> Tensor:
        """H + d I, fp32 [K, K]; positive definite for share > 0."""
        return self.hessian + self.damping(share) * torch.eye(len(self.hessian), device=self.hessian.device)

    def target(self, weight: Tensor, share: float, correction: float) -> Tensor:
        """W + correction (W C H^-1 - W), with H and C damped: fp32 [N, K]."""
        if not correction:
            return weight
        change = weight.double() @ (self.cross - self.hessian).double()
        factor, _ = torch.linalg.cholesky_ex(self.damped(share).double())
        return weight + correction * torch.cholesky_solve(change.T, factor).T.to(weight.dtype)

    @property
    def rank_deficient(self) -> bool:
        """Whether there were fewer tokens than columns, or columns that were always 0."""
        return self.tokens < len(self.hessian) or bool((self.hessian.diagonal() <= 0).any())


def stages(task: BlockTask) -> list[list[str]]:
    """Names of linears that read the same tensor, in the order in which the block runs them.

    Raises ModelError if a linear is never run.
    """
    assert task.inputs is not None
    found: list[list[str]] = []
    held: list[Tensor] = []  # keeps the inputs alive, so that no other can be taken for one of them

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            if any(name in stage for stage in found):
                return
            if held and held[-1] is arguments[0]:
                found[-1].append(name)
            else:
                found.append([name])
                held.append(arguments[0])

        return hook

    with _hooks(task, {name: note(name) for name in task.weights}), torch.no_grad():
        task.call(task.block, task.inputs[:1].to(_device(task)))
    missing = set(task.weights) - {name for stage in found for name in stage}
    if missing:
        raise ModelError(
            f"the block never runs {', '.join(sorted(missing))}, so its inputs cannot be seen",
            hint="leave the layer out with --skip, or use a method without calibration",
        )
    return found


def moments(task: BlockTask, stage: Sequence[str], solved: Mapping[int, Mapping[str, Tensor]]) -> dict[int, Moments]:
    """The moments of a stage's inputs at each bits, where linears in `solved[bits]` have those weights [N, K]."""
    assert task.inputs is not None
    first, device = stage[0], _device(task)
    columns = task.weights[first].shape[1]
    result = {}
    for bits, chain in task.chains.items():
        hessian = torch.zeros(columns, columns, device=device)
        cross = torch.zeros_like(hessian)
        count = 0
        for start in range(0, len(chain), WINDOWS_A_BATCH):
            rows = slice(start, start + WINDOWS_A_BATCH)
            original = _input_of(task, first, task.inputs[rows].to(device))
            with with_weights(task, solved[bits]):
                quantized = _input_of(task, first, chain[rows].to(device))
            hessian.addmm_(quantized.T, quantized)
            cross.addmm_(original.T, quantized)
            count += len(quantized)
        result[bits] = Moments(hessian / count, cross / count, count)
    return result


@torch.no_grad()
def _input_of(task: BlockTask, name: str, hidden: Tensor) -> Tensor:
    """What the linear reads when the block runs on `hidden`: fp32 [tokens, K]."""
    seen: list[Tensor] = []

    def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        seen.append(arguments[0].reshape(-1, arguments[0].shape[-1]).float())
        raise _Reached

    with _hooks(task, {name: hook}), contextlib.suppress(_Reached):
        task.call(task.block, hidden)
    return seen[0]


@contextlib.contextmanager
def _hooks(task: BlockTask, hooks: Mapping[str, Callable[[nn.Module, tuple[Tensor, ...]], None]]) -> Iterator[None]:
    handles = [task.block.get_submodule(name).register_forward_pre_hook(hook) for name, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def with_weights(task: BlockTask, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """The block with these weights [N, K] in the places of its own."""
    kept = {}
    for name, weight in weights.items():
        module = task.block.get_submodule(name)
        kept[name] = module.weight
        module.weight = nn.Parameter((weight.T if name in task.transposed else weight), requires_grad=False)
    try:
        yield
    finally:
        for name, parameter in kept.items():
            task.block.get_submodule(name).weight = parameter


def _device(task: BlockTask) -> torch.device:
    return next(iter(task.weights.values())).device
