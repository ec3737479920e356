"""A checkpoint of nested planes in vLLM, with bits chosen per request.

vLLM finds `register` by the entry point `vllm.general_plugins`, in every process that it starts. Nothing of vLLM is
replaced or patched: what is used are a quantization config, a model loader, a logits processor, a scheduler class, a
middleware and a model state, all by vLLM's own doors.

    versions    which vLLM versions are known
    words       errors as vLLM prints them
    options     what the operator sets: bits, max_bits, plans, a policy
    offered     the bits and plans that requests may ask for, and what is wrong with others
    stored      the tensors of one of vLLM's layers, and how tensor parallelism cuts them
    parameters  those tensors as parameters that vLLM's loader fills
    rows        the bits of every row of the step that runs
    product     a packed weight, and the ops that a compiler sees instead of it
    linear, embedding, experts, config    the quantization
    requests    bits of requests: checked in the server, handed to the rows where the model runs
    names       a middleware: bits by the model's name
    scheduler   prefixes are shared among requests at the same bits only
    admission, counts    the scheduler's policy by load, and what it counts for /metrics
    state, loader    the same for model runner V2
    speculation      drafts with the same weights at fewer bits
    waiting     threads of torch beside those of our kernels

All classes stand at the top of their modules: vLLM pickles what it sends to its workers, and a class made inside a
function would arrive as another class with a state of its own.
"""

from __future__ import annotations

__all__ = ["register"]


def register() -> None:
    """Tell vLLM of the quantization `bitstrata` and of the load format of that name; may be called twice."""
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.model_executor.model_loader import register_model_loader

    from .config import BitstrataConfig
    from .loader import BitstrataLoader

    register_quantization_config("bitstrata")(BitstrataConfig)
    register_model_loader("bitstrata")(BitstrataLoader)
