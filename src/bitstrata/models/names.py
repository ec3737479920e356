"""Stored tensor names -> names in the model, and words for stored names that fit nothing."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedModel

from ..errors import ModelError

# what wrappers put into the names of the model they hold -> how to save that model itself
WRAPPERS = {
    "lora_A": "merge the adapter (peft: merge_and_unload), then save_pretrained",
    "base_layer": "merge the adapter (peft: merge_and_unload), then save_pretrained",
    "base_model": "save the model inside the peft wrapper: merge_and_unload, then save_pretrained",
    "_orig_mod": "save the model before torch.compile, or model._orig_mod.save_pretrained",
    "module": "save the model inside the parallel wrapper: model.module.save_pretrained",
    "_fsdp_wrapped_module": "gather a full state dict before saving, without the FSDP wrapper's names",
    "_checkpoint_wrapped_module": "save the model without the activation checkpointing wrapper",
}


def bind(model: PreTrainedModel, stored_names: Iterable[str]) -> dict[str, str]:
    """State-dict name -> stored name.

    Names may differ by the base model's prefix and by the renamings that transformers applies to
    older files. Of a pair that the config ties, one name may be stored for both. Raises ModelError
    for tensors that transformers would merge or split.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    expected = set(model.state_dict())
    prefix = f"{model.base_model_prefix}."
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    names: dict[str, str] = {}
    for stored in sorted(stored_names):
        renamed = stored
        for renaming in renamings:
            renamed, _ = renaming.rename_source_key(renamed)
        if any(converter.rename_source_key(renamed)[1] is not None for converter in converters):
            raise ModelError(
                f"{stored} is stored in pieces that transformers merges or splits when it loads them, as those of a "
                "mixture of experts",
                hint="such models cannot be quantized yet",
            )
        for candidate in (renamed, prefix + renamed, renamed.removeprefix(prefix)):
            if candidate in expected:
                names[candidate] = stored
                break
    return names


def share(names: dict[str, str], ties: Iterable[tuple[str, str]]) -> dict[str, str]:
    """`names` with the stored name of one side of a tie for the other side too, where that has none."""
    shared = dict(names)
    pairs = list(ties)
    for _ in range(2):  # a third name of a group may be the one that is stored
        for target, source in pairs:
            for here, there in ((source, target), (target, source)):
                if here not in shared and there in shared:
                    shared[here] = shared[there]
    return shared


def missing_tensors(where: object, kind: str, missing: list[str], unused: list[str]) -> ModelError:
    """One error for all tensors of the model that its files lack; `unused` are those that fit nothing.

    where: the folder; kind: the model's class.
    """
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    said = f"{where} stores no tensor for {', '.join(missing[:3])}{more}"
    parts = {part for name in unused for part in name.split(".")}
    wrapper = next((part for part in WRAPPERS if part in parts), None)
    if wrapper is not None:
        example = next(name for name in unused if wrapper in name.split("."))
        return ModelError(f"{said}; its names are those of a wrapper, such as {example}", hint=WRAPPERS[wrapper])
    if unused:
        return ModelError(
            f"{said}; it stores {', '.join(unused[:3])}{' and others' if len(unused) > 3 else ''}, which {kind} lacks",
            hint="config.json and the weights are of different models, or of another version of it",
        )
    return ModelError(said, hint="is the download complete?")
