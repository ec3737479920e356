"""What the scheduler tells Prometheus: requests and tokens by their bits, and the policy's level.

vLLM's `/metrics` is answered by the server's process, the scheduler runs in another. Counters reach the one from the
other by Prometheus' own way for several processes, files in the folder PROMETHEUS_MULTIPROC_DIR. vLLM makes one by
itself for `--api-server-count` above 1; for one server the operator sets it. Without it nothing is counted.
"""

from __future__ import annotations

import os
from collections import Counter as Tally
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from prometheus_client import Counter, Gauge

from .offered import Choice

FOLDER = "PROMETHEUS_MULTIPROC_DIR"


@cache
def metrics() -> tuple[Counter, Counter, Gauge]:
    """Those of this process: requests, tokens, the policy's level."""
    return (
        Counter(
            "bitstrata_requests",
            "Finished requests by the bits or plan that computed them, and why they ended.",
            ["engine", "bits", "outcome"],
        ),
        Counter("bitstrata_tokens_by_bits", "New tokens by the bits or plan that computed them.", ["engine", "bits"]),
        Gauge(
            "bitstrata_policy_steps",
            "Steps that requests with min_bits are lowered by when they start now.",
            ["engine"],
            multiprocess_mode="mostrecent",
        ),
    )


class Counts:
    """Of one engine.

    Args:
        engine: its number among the data parallel ones.
    """

    def __init__(self, engine: int) -> None:
        self._engine = str(engine)
        self._requests, self._tokens, self._level = metrics()
        self._level.labels(self._engine).set(0)

    @classmethod
    def of(cls, vllm_config: Any) -> Counts | None:
        """None where nobody would see them."""
        return cls(vllm_config.parallel_config.data_parallel_index) if os.environ.get(FOLDER) else None

    def add(self, outputs: Iterable[Any], choices: Mapping[str, Choice], level: int) -> None:
        """The outputs of one step, the choices of its requests by their name, and the policy's level."""
        tokens: Tally[Choice] = Tally()
        for output in outputs:
            choice = choices.get(output.request_id)
            if choice is None:
                continue
            tokens[choice] += len(output.new_token_ids)
            if output.finish_reason is not None:
                self._requests.labels(self._engine, str(choice), str(output.finish_reason)).inc()
        for choice, count in tokens.items():
            self._tokens.labels(self._engine, str(choice)).inc(count)
        self._level.labels(self._engine).set(level)
