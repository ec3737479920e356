"""The output head and the token embedding: what of them can be stored as planes, and putting planes in their place.

Both are found through transformers' own accessors. A tied pair is one layer, the embedding, whose
planes the head multiplies by; otherwise they are two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel

from ..checkpoint import LayerSpec
from ..errors import CheckpointError, ModelError
from ..nn import BitsState, PlaneEmbedding, TiedHead
from .compat import embedding_scale, is_scaled_embedding, tied_parameters, untie
from .discover import set_submodule, submodule
from .kinds import linear_info

HINT = "leave --head-bits out: the head and the embedding then stay as they are"


@dataclass(frozen=True)
class HeadLayer:
    """An output head or a token embedding, W [out_features, in_features], a row for each token.

    tied: of an embedding, the output head that shares its weight.
    """

    name: str
    in_features: int
    out_features: int
    bias: bool
    role: Literal["head", "embedding"]
    tied: str | None = None

    def spec(self, bits: int) -> LayerSpec:
        """How the checkpoint describes it."""
        return LayerSpec(
            in_features=self.in_features,
            out_features=self.out_features,
            bias=self.bias,
            bits=[bits],
            role=self.role,
            tied=self.tied,
        )


def find_head(model: PreTrainedModel) -> tuple[HeadLayer, ...]:
    """The embedding, and the head if it has a weight of its own. Raises ModelError if they cannot be quantized."""
    kind = type(model).__name__
    names = {id(module): name for name, module in model.named_modules()}
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:
        embedding = None
    head = model.get_output_embeddings()
    if embedding is None or head is None:
        missing = "token embedding" if embedding is None else "output head"
        raise ModelError(f"{kind} does not say which layer is its {missing}, so it cannot be quantized", hint=HINT)
    problem = embedding_problem(embedding)
    if problem is not None:
        name = names.get(id(embedding), "its token embedding")
        raise ModelError(f"{name} of {kind} cannot be quantized: {problem}", hint=HINT)
    linear = linear_info(names[id(head)], head, 0)
    if linear is None or linear.transposed:
        raise ModelError(
            f"{names[id(head)]} of {kind} cannot be quantized: it is a {type(head).__name__}, not an nn.Linear",
            hint=HINT,
        )
    assert isinstance(embedding, nn.Embedding)
    rows, columns = embedding.weight.shape
    tied = embedding.weight is head.weight
    owners = [name for name, value in model.named_parameters(remove_duplicate=False) if value is embedding.weight]
    if len(owners) > 1 + tied:
        raise ModelError(
            f"the token embedding of {kind} cannot be quantized: other layers share its weight ({', '.join(owners)})",
            hint=HINT,
        )
    own = HeadLayer(names[id(embedding)], columns, rows, False, "embedding", linear.name if tied else None)
    if tied:
        return (own,)
    return own, HeadLayer(linear.name, linear.in_features, linear.out_features, linear.bias, "head")


def embedding_problem(module: nn.Module) -> str | None:
    """Why `module` cannot become a PlaneEmbedding; None if it can."""
    if not isinstance(module, nn.Embedding):
        return f"it is a {type(module).__name__}, not an nn.Embedding"
    if type(module) is not nn.Embedding and not is_scaled_embedding(module):
        return f"a {type(module).__name__} does more than look rows up"
    if module.max_norm is not None:
        return "it renormalizes its rows (max_norm)"
    return None


def put_embedding(
    model: PreTrainedModel, name: str, layer: LayerSpec, shared: dict[str, Any], state: BitsState
) -> None:
    """Put an empty PlaneEmbedding in the place of the embedding `name`, and a TiedHead in that of the head tied to it.

    Args:
        layer: what the checkpoint says of it.
        shared: group_size, scales, device and dtype.
        state: of the model.

    Raises CheckpointError if it does not fit the model.
    """
    module = submodule(model, name)
    problem = embedding_problem(module)
    if problem is not None or tuple(module.weight.shape) != (layer.out_features, layer.in_features):
        raise CheckpointError(
            f"{name}: the checkpoint has an embedding [{layer.out_features}, {layer.in_features}], "
            f"the model has {module}"
        )
    partners = [sink for sink, source in tied_parameters(model).items() if source == f"{name}.weight"]
    if partners != ([] if layer.tied is None else [f"{layer.tied}.weight"]):
        raise CheckpointError(
            f"{name}: the checkpoint ties it to {layer.tied or 'no output head'}, "
            f"the model's config to {', '.join(partners) or 'none'}"
        )
    scale, is_rounded = embedding_scale(module)
    assert layer.bits is not None
    embedding = PlaneEmbedding(
        layer.out_features,
        layer.in_features,
        bits=layer.bits[0],
        state=state,
        scale=scale,
        round_scale=is_rounded,
        padding_idx=module.padding_idx,
        **shared,
    )
    set_submodule(model, name, embedding)
    if layer.tied is not None:
        head = submodule(model, layer.tied)
        info = linear_info(layer.tied, head, 0)
        if info is None or (info.in_features, info.out_features) != (layer.in_features, layer.out_features):
            raise CheckpointError(f"{layer.tied} cannot share the planes of {name}: the model has {head}")
        set_submodule(model, layer.tied, TiedHead(embedding, bias=info.bias))
        untie(model, f"{layer.tied}.weight")


def check_untied(model: PreTrainedModel, name: str) -> None:
    """Raise CheckpointError if the model ties its output head `name`, which has planes of its own, to another layer."""
    source = tied_parameters(model).get(f"{name}.weight")
    if source is not None:
        raise CheckpointError(f"{name} has planes of its own, but the model's config ties it to {source}")
