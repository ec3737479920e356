"""`--scheduler-cls bitstrata.integrations.vllm.scheduler.BitsScheduler`: prefixes are shared at the same bits only.

Keys and values depend on the bits that they were computed at. vLLM finds those of a prefix by hashes that a request's
`cache_salt` goes into; here the bits, or the plan's name, become a part of it, beside the salt that a user gave.

It is also where a policy by load acts (admission.py): requests that may be lowered get their bits when they start.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from ...errors import UsageError
from .admission import Admission
from .config import BitstrataConfig
from .counts import Counts
from .offered import BITS, MIN_BITS, PLAN, Asked, Choice
from .words import with_hints

_WAITING = (RequestStatus.WAITING, RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR)


@dataclass
class _Lowerable:
    """A request that leaves a choice, from when it arrives until it ends."""

    request: Request
    asked: Asked
    salt: str | None
    steps: int
    now: Choice


class BitsScheduler(Scheduler):  # type: ignore[misc]
    """vLLM's scheduler, or where that was chosen its asynchronous one."""

    def __new__(cls, vllm_config: Any, *arguments: Any, **options: Any) -> BitsScheduler:
        chosen = AsyncBitsScheduler if vllm_config.scheduler_config.async_scheduling else cls
        made: BitsScheduler = super().__new__(chosen)
        return made

    @with_hints()
    def __init__(self, vllm_config: Any, *arguments: Any, **options: Any) -> None:
        config = vllm_config.quant_config
        if not isinstance(config, BitstrataConfig):
            raise UsageError("bits can be chosen for bitstrata checkpoints only, and this model is none")
        super().__init__(vllm_config, *arguments, **options)
        self._offered, self._shares = config.offered, config.options.share_prefixes
        self._admission = Admission(config.offered, config.options.make_policy())
        self._lowerable: dict[str, _Lowerable] = {}
        self._counts = Counts.of(vllm_config) if self.log_stats else None

    def add_request(self, request: Request) -> None:
        params = request.sampling_params
        if params is not None and request.request_id not in self.requests:
            asked, salt = self._offered.of_request(params.extra_args), request.cache_salt
            steps = self._admission.steps(asked)
            if steps:
                self._lowerable[request.request_id] = _Lowerable(request, asked, salt, steps, asked.choice)
            self._salt(request, asked.choice, salt)
        super().add_request(request)

    def schedule(self, *arguments: Any, **options: Any) -> SchedulerOutput:
        self._lowerable = {name: one for name, one in self._lowerable.items() if name in self.requests}
        running, _ = self.get_request_counts()
        if not running:
            self._admission.idle()
        self._follow()
        made = super().schedule(*arguments, **options)
        _, waiting = self.get_request_counts()
        self._admission.observe(waiting, max((one.steps for one in self._lowerable.values()), default=0))
        return made

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: Any) -> Any:
        counted = self._choices(scheduler_output) if self._counts is not None else {}
        made = super().update_from_output(scheduler_output, model_runner_output)
        self._admission.step_ended(any(scheduler_output.scheduled_cached_reqs.num_output_tokens))
        if not any(self.get_request_counts()):
            self._admission.idle()
        if self._counts is not None:
            outputs = [output for client in made.values() for output in client.outputs]
            self._counts.add(outputs, counted, self._admission.level)
        return made

    def _follow(self) -> None:
        """Let requests that wait follow the level."""
        for one in self._lowerable.values():
            choice = self._admission.choice(one.asked)
            if choice != one.now and one.request.status in _WAITING:
                one.now = choice
                params = one.request.sampling_params
                others = {key: value for key, value in params.extra_args.items() if key not in (BITS, PLAN, MIN_BITS)}
                params.extra_args = {**others, BITS: choice}  # a new one: requests of one prompt share theirs
                self._salt(one.request, choice, one.salt)

    def _salt(self, request: Request, choice: Choice, salt: str | None) -> None:
        """Let `request` go on from keys and values of its own choice only."""
        if self._shares:
            return
        request.cache_salt = f"bits {choice!r} {salt or ''}"
        request.block_hashes.clear()  # made without the salt
        request.update_block_hashes()

    def _choices(self, scheduler_output: SchedulerOutput) -> dict[str, Choice]:
        """What the requests of a step run at."""
        found = {}
        for name in scheduler_output.num_scheduled_tokens:
            request = self.requests.get(name)
            if request is not None and request.sampling_params is not None:
                found[name] = self._offered.of_request(request.sampling_params.extra_args).choice
        return found


class AsyncBitsScheduler(BitsScheduler, AsyncScheduler):  # type: ignore[misc]
    """BitsScheduler for asynchronous scheduling."""
