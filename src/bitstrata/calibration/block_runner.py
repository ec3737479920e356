"""Run a causal language model block by block, weights read when needed.

The model is a skeleton on meta. What lies outside the decoder blocks (embeddings, final norm,
head) is filled in for the first and the last step only, a block only while it is worked on. So
memory holds

    max(outside the blocks, one block) as stored  +  the hidden states of a batch,

whatever the size of the model and the number of windows. What a block needs besides hidden states
(masks, positions) depends neither on weights nor on tokens: it is recorded once, by sending one
window through stand-ins that pass their input on. Hidden states are fp32 [windows, seq_len, hidden];
products may be made in bf16 (`arithmetic`). `check` finds out whether a model is like that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from ..errors import ModelError
from ..memory import is_out_of_memory
from ..models.discover import Discovery, find_blocks
from ..models.source import SourceModel, release
from ..progress import log
from ..solvers.method import Windows
from .lanes import EVERYTHING, Share, batches
from .widening import may_stay_narrow, widening

TOKENS_PER_BATCH = 1024  # what a block makes of more does not stay in the caches of two cores
# what a model's own code raises when it is given something else than it expects
MODELS_OWN = (ValueError, TypeError, IndexError, RuntimeError, AttributeError)
LOGITS = 1 << 23  # logits held at a time, all chains together
APART = 1e-3  # relative distance of the same windows together and one by one that is still rounding
HALF_APART = 0.1  # of what a block adds to hidden states, in bf16 and in fp32


def arithmetic(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """A context in which products are made in `dtype`; norms, softmax and sums of hidden states stay fp32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32, cache_enabled=False)


def half_products(device: torch.device) -> bool:
    """Whether `device` multiplies bf16 faster than fp32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    found: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # older torch does not say
    return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "avx10_1", "bf16"))


def _equal(one: Any, other: Any) -> bool:
    """Whether tensors in two equally nested values are the same; flags and a model's own objects do not count."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_equal(value, other[key]) for key, value in one.items())
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(_equal, one, other))
    return True


class _StandIn(nn.Module):
    """Takes a block's place; hands its call to `visit`, which returns the hidden states to pass on."""

    def __init__(self, block: nn.Module, visit: Callable[[Tensor, tuple[Any, ...], dict[str, Any]], Any]) -> None:
        super().__init__()
        self.__dict__["_block"] = block
        self.__dict__["_visit"] = visit

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_block"], name)  # models ask a block for its attention type and the like

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self._visit(hidden_states, args, kwargs)


class Reached(Exception):  # noqa: N818
    """Not an error: the part of a model that was wanted has run."""


@dataclass(frozen=True)
class Ends:
    """What a model does before its blocks and after them; weights: parameter name -> what stands for the model's own.

    embed: tokens int64 [b, S], weights -> hidden states before the first block, fp32 [b, S, hidden].
    logits: hidden states after the last block [b, S, hidden], tokens, weights -> fp32 [b, S, vocabulary],
        differentiable in the hidden states.
    """

    embed: Callable[[Tensor, Mapping[str, Tensor]], Tensor]
    logits: Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor]


class BlockRunner:
    """Runs `source` one block at a time.

    Args:
        source: the model's files.
        model: its skeleton on meta.
        discovery: what `discover` found in it.
        seq_len: the length of every window.
        device: where blocks run.
    """

    def __init__(
        self, source: SourceModel, model: PreTrainedModel, discovery: Discovery, seq_len: int, device: torch.device
    ) -> None:
        self.source, self.model, self.discovery, self.device = source, model, discovery, device
        self._list_name = find_blocks(model)
        self._blocks: list[nn.Module] = list(model.get_submodule(self._list_name).children())
        self._batch = max(1, TOKENS_PER_BATCH // seq_len)
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._beside: int | None = None  # how many values blocks return after hidden states; None: no tuple
        self._alone = self._probed = False
        self.hidden_size = 0  # the width of hidden states, once something is known of the blocks

    @contextmanager
    def _in_memory(
        self, module: nn.Module, prefix: str = "", skip: Iterable[str] = (), *, narrow: bool = True
    ) -> Iterator[None]:
        """The source's weights in `module`, whose name is `prefix`, but not those in `skip`; it computes in fp32.

        narrow: weights of linears and embeddings stay in the dtype that they are stored in (widening.py).
        """
        try:
            self.source.materialise(module, prefix, skip, may_stay_narrow(module, prefix) if narrow else ())
            if module is self.model:
                self.model.tie_weights()
            # a model's own `to` may refuse some devices; what was skipped stays on meta
            module._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(self.device))
            with widening(module):
                yield
        finally:
            release(module)

    @contextmanager
    def _outside(self, visits: Sequence[Callable[..., Any]]) -> Iterator[None]:
        """Everything but the blocks in memory, and stand-ins in the blocks' places."""
        holder = self.model.get_submodule(self._list_name)
        inside = {name for name in self.model.state_dict() if name.startswith(f"{self._list_name}.")}
        for index, visit in enumerate(visits):
            holder._modules[str(index)] = _StandIn(self._blocks[index], visit)
        try:
            with self._in_memory(self.model, skip=inside):
                yield
        finally:
            for index, block in enumerate(self._blocks):
                holder._modules[str(index)] = block

    @torch.no_grad()
    def check(self, window: Tensor) -> None:
        """Raise ModelError if this model cannot be run block by block. It takes one block and what is outside of them.

        `window`: tokens int64 [1, S] of a text.
        """
        if getattr(self.model.config.get_text_config(decoder=True), "num_kv_shared_layers", 0):
            raise self._unsupported("its later blocks read the keys and values of earlier ones")
        self._record(window, window.flip(-1))
        hidden = self.embed(window)
        with self.block(0) as block:
            try:
                self.call(0, block, hidden.to(self.device))
            except MODELS_OWN as error:
                if is_out_of_memory(error):
                    raise
                raise self._unsupported(str(error)) from error

    @torch.no_grad()
    def embed(self, tokens: Tensor, replaced: Mapping[str, Tensor] | None = None) -> Tensor:
        """Hidden states before the first block: tokens int64 [n, S] -> fp32 [n, S, hidden].

        `replaced`: parameter name -> fp32 weight in the place of the source's.
        """
        return torch.cat(list(self.embedded(tokens, replaced)))

    @torch.no_grad()
    def embedded(
        self, tokens: Tensor, replaced: Mapping[str, Tensor] | None = None, share: Share = EVERYTHING
    ) -> Iterator[Tensor]:
        """The same of the windows of `share`, a batch at a time."""
        first: list[Tensor] = []

        def note(hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            first.append(hidden.float().cpu())
            raise Reached

        self.prepare(tokens)
        weights = self._here(replaced)
        with self._outside([note] * len(self._blocks)):
            for rows in batches(len(tokens), self._batch, share):
                with contextlib.suppress(Reached):
                    self._run_model(tokens[rows], weights)
                yield first.pop()

    def prepare(self, tokens: Tensor) -> None:
        """Find out what blocks are called with, from the first of the windows tokens int64 [n, S]."""
        self._record(tokens[:1])

    def _record(self, window: Tensor, other: Tensor | None = None) -> None:
        """Note what each block is called with. Blocks return hidden states, bare or first in a tuple of up to three.

        Raises ModelError if that cannot be done, or if blocks are given something else for the tokens of `other`.
        """
        reason: Exception | None = None
        for self._beside in (None, 0, 1, 2):
            try:
                self._calls = self._recorded(window)
                break
            except MODELS_OWN as error:
                if is_out_of_memory(error):
                    raise
                reason = error
        else:
            raise self._unsupported(str(reason)) from reason
        if other is not None and not _equal(self._calls, self._recorded(other)):
            raise self._unsupported("its blocks are given more of the tokens than their hidden states")

    def _unsupported(self, reason: str) -> ModelError:
        return ModelError(
            f"{type(self.model).__name__} cannot be run block by block: {reason}",
            hint="leave --calibration out and use a method without it: --preset fast",
        )

    def _recorded(self, tokens: Tensor) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        shapes: set[torch.Size] = set()

        def record(hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            calls.append((args, kwargs))
            if not shapes and (hidden.dim() != 3 or hidden.shape[:2] != tokens.shape):
                shape = list(hidden.shape)
                raise self._unsupported(
                    f"hidden states of {list(tokens.shape)} tokens are {shape}, not one vector each"
                )
            shapes.add(hidden.shape)
            self.hidden_size = hidden.shape[-1]
            if len(shapes) > 1:  # the model took the tensor apart: it expects a tuple
                raise TypeError(f"hidden states changed their shape from block to block: {shapes}")
            if len(calls) == len(self._blocks):
                raise Reached
            return self._returned(hidden)

        with self._outside([record] * len(self._blocks)), contextlib.suppress(Reached):
            self._run_model(tokens, {})
        if len(calls) != len(self._blocks):
            raise TypeError(f"{len(calls)} of {len(self._blocks)} blocks were called")
        return calls

    def _returned(self, hidden: Tensor) -> Any:
        return hidden if self._beside is None else (hidden, *[None] * self._beside)

    def _here(self, weights: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        return {name: value.to(self.device) for name, value in (weights or {}).items()}

    def _run_model(self, tokens: Tensor, weights: dict[str, Tensor]) -> Tensor:
        """Logits; `weights`: parameter name -> what stands for the model's own."""
        arguments = {"input_ids": tokens.to(self.device), "use_cache": False}
        logits: Tensor = functional_call(self.model, weights, (), arguments, tie_weights=False).logits
        return logits

    @torch.no_grad()
    def logits(
        self,
        hidden: Mapping[str, Windows],
        tokens: Tensor,
        replaced: Mapping[str, Tensor] | None = None,
        original: str | None = None,
    ) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Logits after the last block for several chains side by side.

        Args:
            hidden: for each chain its final hidden states [n, S, hidden].
            tokens: int64 [n, S].
            replaced: parameter name -> fp32 weight that the chains other than `original` end in.

        Yields:
            (targets int64 [s], {chain: logits fp32 [s, vocab]}), a stretch of one window at a time.
        """
        current: list[Tensor] = []
        visits: list[Callable[..., Any]] = [lambda h, args, kwargs: self._returned(current[0])] * len(self._blocks)
        vocabulary = self.model.config.get_text_config(decoder=True).vocab_size
        stretch = max(16, min(512, LOGITS // vocabulary // len(hidden)))
        others = self._here(replaced)
        with self._outside(visits):
            for window in range(len(tokens)):
                whole = {chain: states[window : window + 1] for chain, states in hidden.items()}
                for start in range(0, tokens.shape[1] - 1, stretch):
                    end = min(start + stretch, tokens.shape[1] - 1)
                    result = {}
                    for chain, states in whole.items():
                        current[:] = [states[:, start:end].to(self.device)]
                        weights = {} if chain == original else others
                        result[chain] = self._run_model(tokens[window : window + 1, start:end], weights)[0].float()
                    yield tokens[window, start + 1 : end + 1].to(self.device), result

    @contextmanager
    def ends(self) -> Iterator[Ends]:
        """What lies outside the blocks in memory, as long as it takes."""
        current: list[Tensor] = []
        reached: list[Tensor] = []

        def visit(hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if current:
                return self._returned(current[0])
            reached[:] = [hidden]
            raise Reached

        def embed(tokens: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
            current.clear()
            with torch.no_grad(), contextlib.suppress(Reached):
                self._run_model(tokens, dict(weights))
            return reached.pop().float()

        def logits(hidden: Tensor, tokens: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
            current[:] = [hidden]
            return self._run_model(tokens, dict(weights)).float()

        with self._outside([visit] * len(self._blocks)):
            yield Ends(embed, logits)

    @contextmanager
    def block(self, index: int, skip: Iterable[str] = (), *, narrow: bool = True) -> Iterator[nn.Module]:
        """Block `index` with its weights in memory, but not those in `skip`, which are on meta; it computes in fp32.

        narrow: weights of linears stay in the dtype that they are stored in.
        """
        with self._in_memory(self._blocks[index], self.discovery.blocks[index], skip, narrow=narrow):
            yield self._blocks[index]

    def call(self, index: int, block: nn.Module, hidden: Tensor) -> Tensor:
        """One call of block `index` on hidden [b, S, hidden], differentiable."""
        if self._alone and len(hidden) > 1:
            return torch.cat([self.call(index, block, window) for window in hidden.split(1)])
        args, kwargs = self._calls[index]
        output = block(hidden, *args, **kwargs)
        if self._beside is not None and isinstance(output, (tuple, list)):
            output = output[0]
        if not isinstance(output, Tensor) or output.shape != hidden.shape:
            raise ModelError(
                f"{self.discovery.blocks[index]} returned {type(output).__name__}, not hidden states alone",
                hint="leave --calibration out and use a method without it: --preset fast",
            )
        return output

    @property
    def batch(self) -> int:
        """Windows that run at a time."""
        return 1 if self._alone else self._batch

    @torch.no_grad()
    def probe(self, index: int, block: nn.Module, hidden: Windows) -> None:
        """Find out once whether what was recorded for one window serves several at a time."""
        if self._probed or len(hidden) < 2:
            return
        self._probed = True
        two = hidden[:2].to(self.device)
        try:
            together = self.call(index, block, two)
        except (RuntimeError, ValueError) as error:  # masks or biases that are made for one batch size
            self._alone = True
            if is_out_of_memory(error):
                log.info("memory is enough for one window at a time only, which takes longer")
            return
        one_by_one = torch.cat([self.call(index, block, window) for window in two.split(1)])
        self._alone = not bool((together - one_by_one).norm() <= APART * one_by_one.norm())

    @torch.no_grad()
    def works_in(self, dtype: torch.dtype, index: int, block: nn.Module, hidden: Windows) -> bool:
        """Whether block `index` does with products in `dtype` what it does in fp32, by one of the windows `hidden`."""
        window = hidden[:1].to(self.device)
        expected = self.call(index, block, window)
        try:
            with arithmetic(self.device, dtype):
                found = self.call(index, block, window)
        except MODELS_OWN as error:
            if is_out_of_memory(error):
                raise
            return False
        return bool((found - expected).norm() <= HALF_APART * (expected - window).norm())

    @torch.no_grad()
    def outputs(self, index: int, block: nn.Module, hidden: Windows, share: Share = EVERYTHING) -> Iterator[Tensor]:
        """Block `index` on the windows of `share` of all [n, S, hidden]: its output [b, S, hidden], batch by batch."""
        self.probe(index, block, hidden)
        for rows in batches(len(hidden), self.batch, share):
            yield self.call(index, block, hidden[rows].to(self.device))

    def run(self, index: int, block: nn.Module, hidden: Windows) -> Tensor:
        """The same as one tensor on the CPU."""
        return torch.cat([part.cpu() for part in self.outputs(index, block, hidden)])
