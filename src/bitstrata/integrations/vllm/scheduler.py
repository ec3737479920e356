"""`--scheduler-cls bitstrata.integrations.vllm.scheduler.BitsScheduler`: prefixes are shared at the same bits only.

Keys and values depend on the bits that they were computed at. vLLM finds those of a prefix by hashes that a request's
`cache_salt` goes into; here the bits become a part of it, beside the salt that a user gave.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from .offered import served


class BitsScheduler(Scheduler):  # type: ignore[misc]
    """vLLM's scheduler, or where that was chosen its asynchronous one."""

    def __new__(cls, vllm_config: Any, *arguments: Any, **options: Any) -> BitsScheduler:
        chosen = AsyncBitsScheduler if vllm_config.scheduler_config.async_scheduling else cls
        made: BitsScheduler = super().__new__(chosen)
        return made

    def add_request(self, request: Request) -> None:
        params = request.sampling_params
        if params is not None and request.request_id not in self.requests:
            bits = served().of_request(params.extra_args)
            request.cache_salt = f"{bits} bits {request.cache_salt or ''}"
            request.block_hashes.clear()  # made without the salt
            request.update_block_hashes()
        super().add_request(request)


class AsyncBitsScheduler(BitsScheduler, AsyncScheduler):  # type: ignore[misc]
    """BitsScheduler for asynchronous scheduling."""
