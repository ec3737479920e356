"""The bits of requests: `--logits-processors bitstrata.integrations.vllm.requests:RequestBits`.

A logits processor is where vLLM shows the parameters of requests, before they are admitted and while they run. This one
leaves logits alone. One class serves both model runners, whose interfaces share no method but `apply`.

It is no entry point of the group `vllm.logits_processors`: every server of the environment would load it, whatever its
model.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.config import CUDAGraphMode
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate
from vllm.v1.sample.logits_processor import LogitsProcessor as LogitsProcessorV1
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2

from ...errors import UsageError
from .config import BitstrataConfig
from .offered import served
from .words import with_hints

SCHEDULER = "bitstrata.integrations.vllm.scheduler.BitsScheduler"
_FLAG = f"--scheduler-cls {SCHEDULER}"


class RequestBits(LogitsProcessorV1, LogitsProcessorV2):  # type: ignore[misc]
    """Takes `bits`, `plan` and `min_bits` from the extra arguments of requests (`vllm_xargs`).

    Raises UsageError at the start where a request's bits would not reach the layers, keys and values that were
    computed at other bits could reach a request, or nobody would follow the operator's policy.
    """

    @with_hints()
    def __init__(self, vllm_config: Any, *of_the_runner: Any) -> None:
        config = vllm_config.quant_config
        if not isinstance(config, BitstrataConfig):
            raise UsageError("bits can be chosen for bitstrata checkpoints only, and this model is none")
        self.rows, self.offered = config.rows, config.offered
        if vllm_config.use_v2_model_runner:
            if vllm_config.load_config.load_format != "bitstrata":
                raise UsageError("model runner V2 needs to be told of the bits", hint="add --load-format bitstrata")
        elif vllm_config.compilation_config.cudagraph_mode != CUDAGraphMode.NONE:
            raise UsageError(
                "model runner V1 records bits into CUDA graphs",
                hint="run without VLLM_USE_V2_MODEL_RUNNER=0, or add --enforce-eager",
            )
        check_scheduler(vllm_config, config)

    @classmethod
    @with_hints()
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raise UsageError, a ValueError, for bits and plans that are not offered: HTTP 400."""
        served().of_request(sampling_params.extra_args)

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Runner V1: who is in the batch of the next step, and at what place."""
        process_dict_updates(self.rows.requests, batch_update, self._place_of)

    def _place_of(self, params: SamplingParams, *_: Any) -> int:
        return self.offered.place(self.offered.of_request(params.extra_args).choice)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Runner V2, whose model state knows the bits (state.py): this leaves the logits alone."""
        return False

    def is_argmax_invariant(self) -> bool:
        return True

    def apply(self, logits: Tensor, *context: Any) -> Tensor:
        return logits


def check_scheduler(vllm_config: Any, config: BitstrataConfig) -> None:
    """Raise UsageError if requests at different bits would share keys and values, or the policy needs our scheduler."""
    scheduler = vllm_config.scheduler_config.scheduler_cls
    name = (
        scheduler if isinstance(scheduler, str) or scheduler is None else f"{scheduler.__module__}.{scheduler.__name__}"
    )
    if name == SCHEDULER:
        return
    if config.options.policy is not None:
        raise UsageError(f"nobody would follow the policy {config.options.policy}", hint=f"add {_FLAG}")
    shared = vllm_config.cache_config.enable_prefix_caching and not config.options.share_prefixes
    if shared and len(config.offered.choices) > 1:
        raise UsageError(
            "prefix caching would let a request go on from keys and values of other bits",
            hint=f"add {_FLAG}, which keeps them apart, or --no-enable-prefix-caching; "
            'to allow it, --hf-overrides \'{"bitstrata": {"share_prefixes": true}}\'',
        )
