"""A decoding step in one native call: which models can have it, and what it is told of them.

A model is recognised by its modules, not by its name: decoder blocks of RMS norms, attention with rotary positions and
a gated MLP, as Llama, Mistral, Qwen, Gemma and Phi have them. What has more or other parts raises UnfitError, with the
reason. Norms and activations are told apart by what they compute; the scale, window and cap of attention are what the
model's own forward handed to it. Forward.check compares the result with the model before it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...kernels.cpu.blocked import FEW_ROWS, TYPES, BlockedWeight, isa_of
from ...kernels.cpu.extension import native
from ...kernels.registry import Kernel
from ...models.compat import decoder_of, has_hooks, rotary_types
from ...nn import Assignment, PlaneLinear, TiedHead, bits_state
from .attention import AttentionCall, Span
from .memory import TokenPool

ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    nn.functional.silu,
    lambda x: nn.functional.gelu(x, approximate="tanh"),
    nn.functional.gelu,
    nn.functional.relu,
)  # in the order of the native code's numbers
CHUNK = 256  # positions whose angles are asked for at a time


class UnfitError(Exception):
    """The native step does not know this model; the message says what it does not know."""


@dataclass
class Seen:
    """What the modules computed of a batch: hidden states before and after every block, float32 [T, hidden]; logits."""

    before: list[Tensor]
    after: list[Tensor]
    logits: Tensor
    dtype: torch.dtype


@contextmanager
def watching(model: PreTrainedModel, seen: Seen) -> Iterator[None]:
    """Inside, what goes into and comes out of the decoder's blocks is noted in `seen`."""

    def note(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given = args[0] if args else kwargs["hidden_states"]
        made = output[0] if isinstance(output, tuple) else output
        seen.before.append(given[0].float().clone())
        seen.after.append(made[0].float().clone())

    layers = cast(nn.ModuleList, decoder_of(model).layers)
    hooks = [layer.register_forward_hook(note, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class NativeStep:
    """`model` as the native step runs it, with keys and values in `pool`.

    Args:
        calls: of each layer, how the model's own forward called attention.

    Raises UnfitError.
    """

    def __init__(self, model: PreTrainedModel, pool: TokenPool, calls: Mapping[int, AttentionCall]) -> None:
        if native is None or model.device.type != "cpu":
            raise UnfitError(f"the model is on {model.device}, without the native extension")
        self._state = bits_state(model)
        self._embedding = model.get_input_embeddings()
        parts = _Parts(model, calls)
        self._angles, self._names, self._kept, self.exact = parts.angles, parts.names, parts.kept, parts.exact
        self._hidden, self._vocabulary, self._version = parts.hidden, parts.head_rows, self._state.version
        try:
            self._step = native.Step(parts.isa, parts.hidden, parts.blocks, parts.last, parts.head, parts.logit_softcap)
        except ValueError as error:
            raise UnfitError(str(error)) from error
        self._blocks = len(parts.blocks)
        self._columns: dict[tuple[int, ...], Tensor] = {}
        self.use(pool)

    def use(self, pool: TokenPool) -> None:
        """Keep keys and values in `pool`, which has the tensors of every layer."""
        pairs = [pool.stored(index) for index in range(self._blocks)]
        dtype, bits = pairs[0][0].dtype, pairs[0][0].bits
        if any(pair[0].dtype not in TYPES for pair in pairs):
            raise UnfitError(f"keys are kept in {dtype}")
        if any(keys.width != values.width for keys, values in pairs):
            raise UnfitError("keys and values differ in width")
        self._pairs, self._pool, self._made_for = pairs, pool, pool.version
        keys, values = ([[held.data_ptr() for held in pair[side].tensors] for pair in pairs] for side in (0, 1))
        meanings = [[] if bits is None else [tensors[1] for tensors in held] for held in (keys, values)]
        self._step.set_caches(
            [tensors[0] for tensors in keys],
            [tensors[0] for tensors in values],
            *meanings,
            TYPES[dtype],
            bits or 0,
            pool.tokens,
        )

    @property
    def is_current(self) -> bool:
        """Whether the model still holds the weights that this was made of, and the pool its tensors."""
        return self._version == self._state.version and self._made_for == self._pool.version

    def fits(self, rows: int) -> bool:
        """Whether one call takes so many tokens."""
        return rows <= FEW_ROWS

    def run(self, tokens: Sequence[Sequence[int]], spans: Sequence[Span], bits: Sequence[Assignment]) -> Tensor:
        """As Forward.run, of at most FEW_ROWS tokens."""
        x = self._embedding(torch.tensor([token for part in tokens for token in part])).float().contiguous()
        return self._run(x, spans, bits, range(self._blocks))

    def distance(self, seen: Seen, spans: Sequence[Span], bits: Sequence[Assignment]) -> float:
        """How far this is from what the modules computed on `spans`: of every block, what it adds; and the logits.

        Relative to the size of these, after what the rounding of the sum to the modules' dtype explains.
        """
        grain = torch.finfo(seen.dtype).eps
        worst = torch.zeros(())
        for index, (before, after) in enumerate(zip(seen.before, seen.after, strict=True)):
            x = before.clone()
            self._run(x, spans, bits, range(index, index + 1), logits=False)
            added, off = (after - before).norm(dim=-1), (x - after).norm(dim=-1)
            worst = torch.maximum(worst, ((off - grain * after.norm(dim=-1)).clamp_min(0) / added).max())
        logits = self._run(seen.after[-1].clone(), spans, bits, range(0))
        return float(torch.maximum(worst, (logits - seen.logits).norm() / seen.logits.norm()).nan_to_num(torch.inf))

    def _run(
        self, x: Tensor, spans: Sequence[Span], bits: Sequence[Assignment], blocks: range, logits: bool = True
    ) -> Tensor:
        """x float32 [rows, hidden] through `blocks`, in place, and through the head: logits [spans, V]."""
        starts = [span.start for span in spans for _ in range(span.length)]
        positions = [span.past + step for span in spans for step in range(span.length)]
        columns = [self._column(one) for one, span in zip(bits, spans, strict=True) for _ in range(span.length)]
        table = torch.stack(columns, 1)
        angles = [angles.at(positions) for angles in self._angles]
        wanted, end = [], 0
        for span in spans if logits else ():
            end += span.length
            wanted.append(end - 1)
        result = torch.empty(len(wanted), self._vocabulary, dtype=torch.float32)
        arithmetic = self._state.arithmetic
        self._step.run(
            x.data_ptr(),
            starts,
            positions,
            table.data_ptr(),
            [cosine.data_ptr() for cosine, _ in angles],
            [sine.data_ptr() for _, sine in angles],
            blocks.start,
            blocks.stop,
            wanted,
            result.data_ptr(),
            torch.get_num_threads(),
            self.exact if arithmetic is None else arithmetic == "exact",
        )
        return result

    def _column(self, bits: Assignment) -> Tensor:
        """The bits of every quantized layer of the step, int8."""
        choice = bits.choices[0]
        column = self._columns.get(choice)
        if column is None:
            held = [name if isinstance(name, int) else self._state.of(choice, name) for name in self._names]
            column = self._columns[choice] = torch.tensor(held, dtype=torch.int8)
        return column


class _Angles:
    """Cosines and sines of positions, by the model's own rotary embedding: float32 [positions, width] each."""

    def __init__(self, rotary: nn.Module, layer_type: str | None, depends_on_length: bool) -> None:
        self._rotary, self._layer_type = rotary, layer_type
        self._step = 1 if depends_on_length else CHUNK  # then each position by itself, as when it is decoded
        self._tables = self._ask(0, self._step)

    @property
    def width(self) -> int:
        return self._tables[0].shape[1]

    def at(self, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        have = len(self._tables[0])
        if have <= max(positions):
            pieces = [self._tables]
            while have <= max(positions):
                pieces.append(self._ask(have, self._step))
                have += self._step
            cosine, sine = (torch.cat(side) for side in zip(*pieces, strict=True))
            self._tables = cosine, sine
        index = torch.tensor(positions)
        return self._tables[0][index], self._tables[1][index]

    def _ask(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        extra = {} if self._layer_type is None else {"layer_type": self._layer_type}
        with torch.no_grad():
            cosine, sine = self._rotary(
                torch.zeros(1, dtype=torch.float32), torch.arange(first, first + count)[None], **extra
            )
        return cosine[0].float().contiguous(), sine[0].float().contiguous()


class _Parts:
    """What native.Step is made of; raises UnfitError."""

    def __init__(self, model: PreTrainedModel, calls: Mapping[int, AttentionCall]) -> None:
        self.kept: list[Any] = []  # tensors whose addresses native code knows
        self.names: list[str | int] = []  # of each place in the table of bits, the layer, or its only bits
        self.kernel: Kernel | None = None
        self.angles: list[_Angles] = []
        self._angles_by_type: dict[str | None, int] = {}
        decoder = decoder_of(model)
        for module in model.modules():
            if has_hooks(module):
                raise UnfitError(f"a {type(module).__name__} has hooks")
        children = _children(decoder, "the decoder", {"embed_tokens", "layers", "norm", "rotary_emb"})
        if model.get_input_embeddings() is not children.get("embed_tokens"):
            raise UnfitError("its embedding is not the decoder's")
        self.config = decoder.config
        self._rotary = children.get("rotary_emb")
        self.last = self._norm(children.get("norm"))
        head = model.get_output_embeddings()
        self.head, (self.head_rows, self.hidden) = self._linear(head)
        self.logit_softcap = float(getattr(self.config, "final_logit_softcapping", None) or 0.0)
        layers = list(children["layers"].children())
        if len(layers) != len(calls):
            raise UnfitError("not every layer calls attention once")
        self.blocks = [self._block(layer, calls[index], index) for index, layer in enumerate(layers)]
        if self.kernel is None:
            raise UnfitError("no layer is packed for the CPU's kernels")
        self.isa: str = isa_of(self.kernel)
        self.exact: bool = self.kernel.activations == "exact"

    def _block(self, layer: nn.Module, call: AttentionCall, index: int) -> dict[str, Any]:
        norms = {
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        }
        parts = _children(layer, "a block", {"self_attn", "mlp", *norms})
        attention = _children(
            parts["self_attn"], "attention", {"q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "q_norm", "k_norm"}
        )
        mlp = _children(
            parts["mlp"], "the MLP", {"gate_proj", "up_proj", "gate_up_proj", "down_proj", "act_fn", "activation_fn"}
        )
        around = "pre_feedforward_layernorm" in parts
        before_mlp = "pre_feedforward_layernorm" if around else "post_attention_layernorm"
        qkv = ["qkv_proj"] if "qkv_proj" in attention else ["q_proj", "k_proj", "v_proj"]
        gate_up = ["gate_up_proj"] if "gate_up_proj" in mlp else ["gate_proj", "up_proj"]
        for found, names in ((attention, [*qkv, "o_proj"]), (mlp, [*gate_up, "down_proj"])):
            if missing := [name for name in names if name not in found]:
                raise UnfitError(f"a block has no {missing[0]}")
        out, (_, attended) = self._linear(attention["o_proj"])
        width = call.width
        if call.unknown:
            raise UnfitError(f"attention takes {', '.join(call.unknown)}")
        rotary = self._angles_of(layer, parts["self_attn"], index)
        return {
            "before_attention": self._norm(parts.get("input_layernorm")),
            "after_attention": self._norm(parts.get("post_attention_layernorm") if around else None),
            "before_mlp": self._norm(parts.get(before_mlp)),
            "after_mlp": self._norm(parts.get("post_feedforward_layernorm")),
            "query_norm": self._norm(attention.get("q_norm"), width),
            "key_norm": self._norm(attention.get("k_norm"), width),
            "qkv": [self._linear(attention[name])[0] for name in qkv],
            "gate_up": [self._linear(mlp[name])[0] for name in gate_up],
            "out": out,
            "down": self._linear(mlp["down_proj"])[0],
            "heads": attended // width,
            "key_heads": call.key_heads,
            "width": width,
            "window": call.window or 0,
            "rotary": rotary,
            "rotated": self.angles[rotary].width if rotary >= 0 else 0,
            "scale": width**-0.5 if call.scale is None else call.scale,
            "softcap": call.softcap or 0.0,
            "activation": _activation(mlp.get("act_fn") or mlp.get("activation_fn")),
        }

    def _angles_of(self, layer: nn.Module, attention: nn.Module, index: int) -> int:
        """Which table of angles a layer's positions are turned by; -1 for none."""
        if self._rotary is None:
            return -1
        types = rotary_types(self._rotary)
        kinds = getattr(self.config, "layer_types", None)
        wanted = kinds[index] if types and kinds else None
        if wanted not in self._angles_by_type:
            rope = getattr(self.config, "rope_parameters", None) or {}
            rope = rope.get(wanted, rope) if wanted is not None else rope
            depends = rope.get("rope_type", "default") in ("dynamic", "longrope")
            self._angles_by_type[wanted] = len(self.angles)
            self.angles.append(_Angles(self._rotary, wanted, depends))
        return self._angles_by_type[wanted]

    def _norm(self, module: nn.Module | None, width: int | None = None) -> dict[str, Any]:
        if module is None:
            return {"weight": 0, "epsilon": 0.0}
        weight = getattr(module, "weight", None)
        epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if (
            not isinstance(weight, Tensor)
            or weight.dim() != 1
            or epsilon is None
            or getattr(module, "bias", None) is not None
        ):
            raise UnfitError(f"{type(module).__name__} is not an RMS norm")
        if width is not None and len(weight) != width:
            raise UnfitError(f"{type(module).__name__} is over all heads together")
        held = weight.detach().float()
        probe = torch.linspace(-3, 2, len(held)).cos()
        with torch.no_grad():
            found = module(probe.to(weight.dtype)[None])[0].float()
        probe = probe.to(weight.dtype).float()
        plain = probe * torch.rsqrt(probe.square().mean() + epsilon)
        for candidate in (held, held + 1):
            if torch.allclose(found, plain * candidate, rtol=0.02, atol=0.02 * float(candidate.abs().max())):
                return {"weight": self._address(candidate), "epsilon": float(epsilon)}
        raise UnfitError(f"{type(module).__name__} computes something else than an RMS norm")

    def _linear(self, module: nn.Module | None) -> tuple[dict[str, Any], tuple[int, int]]:
        """What native code is told of a linear layer, and its shape [out, in]."""
        bias = 0
        if isinstance(module, (PlaneLinear, TiedHead, nn.Linear)) and module.bias is not None:
            bias = self._address(module.bias.detach().float())
        if isinstance(module, (PlaneLinear, TiedHead)):
            weight = (module if isinstance(module, PlaneLinear) else module.embedding).packed
            if not isinstance(weight, BlockedWeight):
                raise UnfitError(f"a layer is held in the layout {weight.layout!r}")
            if self.kernel is not None and weight.kernel.name != self.kernel.name:
                raise UnfitError("layers run on several kernels")
            self.kernel = weight.kernel
            self.kept.append(weight)
            self.names.append(module.name if isinstance(module, PlaneLinear) else module.embedding.bits[0])
            place = len(self.names) - 1
            return {"bias": bias, "place": place, "planes": weight.handle}, (weight.out_features, weight.in_features)
        if type(module) is not nn.Linear or module.weight.dtype not in TYPES:
            raise UnfitError(f"a layer is a {type(module).__name__}")
        matrix = module.weight.detach().contiguous()
        rows, columns = matrix.shape
        self.kept.append(matrix)
        dense = {"dense": matrix.data_ptr(), "type": TYPES[matrix.dtype], "rows": rows, "columns": columns}
        return {"bias": bias, "place": -1, **dense}, (rows, columns)

    def _address(self, tensor: Tensor) -> int:
        tensor = tensor.contiguous()
        self.kept.append(tensor)
        return tensor.data_ptr()


def _children(module: nn.Module, what: str, known: set[str]) -> dict[str, nn.Module]:
    """Its parts by name; those that do nothing when a model runs are left out."""
    found = {name: child for name, child in module.named_children() if not isinstance(child, (nn.Dropout, nn.Identity))}
    if unknown := sorted(found.keys() - known):
        raise UnfitError(f"{what} ({type(module).__name__}) has a part {unknown[0]}")
    return found


def _activation(module: Any) -> int:
    probe = torch.linspace(-5, 5, 101)
    if module is not None:
        with torch.no_grad():
            found = module(probe)
        for number, function in enumerate(ACTIVATIONS):
            if torch.allclose(found, function(probe), atol=1e-5):
                return number
    raise UnfitError(f"the MLP's activation, {type(module).__name__}, is none of SiLU, GELU and ReLU")
