"""A further process of a job, as quantization/launch.py starts it: `python -m bitstrata.quantization.member`."""

from __future__ import annotations

import sys

from ..progress import own_notes
from ..torch_state import ordinary_torch
from .job import work
from .launch import entered
from .preflight import prepare
from .stages import stages_of


@ordinary_torch()
@own_notes()
def main() -> None:
    """Work on the job whose leader is at the other end of stdin, until it is done."""
    with entered(sys.stdin.buffer) as (team, settings):
        work(prepare(settings, stages_of(settings), weights=False), team)


if __name__ == "__main__":
    main()
