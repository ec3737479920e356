"""Model runner V2: the bits of every row, written into one buffer on the device before each step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .config import BitstrataConfig


class RowBits:
    """The choices of requests by their place in the runner, and the bits of the rows of a step; all on the device.

    Args:
        config: of the model; its rows read the buffer from now on.
        most_requests, most_rows: at any time, padding included.
    """

    def __init__(self, config: BitstrataConfig, most_requests: int, most_rows: int, device: torch.device) -> None:
        self.offered, self.default = config.offered, config.rows.default
        self.buffer = config.rows.hold_buffer(most_rows, device)  # [tables, most_rows]
        self.tables = torch.tensor(config.rows.tables, dtype=torch.int8, device=device)  # [tables, choices]
        self.requests = torch.full((most_requests,), self.default, dtype=torch.int64, device=device)

    def add(self, place: int, extra: dict[str, Any] | None) -> None:
        """The request at `place` is a new one."""
        self.requests[place] = self.offered.place(self.offered.of_request(extra).choice)

    def write(self, places: Tensor, starts: Tensor, rows: int) -> None:
        """Bits of the rows of one step; rows that fill it up are at the default.

        Args:
            places: of the step's requests, integers [requests].
            starts: rows before each request, and all of them: integers [requests + 1], on the device too.
            rows: the last of `starts`, known without waiting for the device.
        """
        counts = starts[1:] - starts[:-1]
        choices = self.requests[places.long()].repeat_interleave(counts, output_size=rows)  # [rows]
        self.buffer.copy_(self.tables[:, self.default, None].expand_as(self.buffer))
        self.buffer[:, :rows] = self.tables[:, choices]


class BitsOfRequests:
    """What a model state does more than its other base class, which is the one that the model would have."""

    def __init__(self, vllm_config: Any, model: Any, encoder_cache: Any, device: torch.device) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)  # type: ignore[call-arg]
        scheduled = vllm_config.scheduler_config
        most = max(scheduled.max_num_batched_tokens, vllm_config.compilation_config.max_cudagraph_capture_size or 0)
        self.row_bits = RowBits(vllm_config.quant_config, scheduled.max_num_seqs, most, device)

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        super().add_request(req_index, new_req_data)  # type: ignore[misc]
        params = new_req_data.sampling_params
        self.row_bits.add(req_index, None if params is None else params.extra_args)

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        count = input_batch.num_reqs
        self.row_bits.write(
            input_batch.idx_mapping[:count], input_batch.query_start_loc[: count + 1], input_batch.num_tokens
        )
        made: dict[str, Any] = super().prepare_inputs(input_batch, req_states)  # type: ignore[misc]
        return made


def bits_state(base: type) -> type:
    """`base`, a class of model states, with the bits of requests."""
    return type(f"Bits{base.__name__}", (BitsOfRequests, base), {})
