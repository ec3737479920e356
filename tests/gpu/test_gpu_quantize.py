"""quantize with device cuda: every method's numbers are those of the CPU."""

from __future__ import annotations

import pytest
from job_helpers import ANYBCQ, ANYPRECISION, BCQ, RTN, run
from pretended_gpu import REAL

# CPUs choose codes in native code, in another order of sums: a code may fall on the other side of a tie
JOBS = {
    "anybcq": (ANYBCQ, 0.02),
    "anyprecision": (ANYPRECISION, 1e-4),
    "bcq": (BCQ, 0.02),
    "bpdq": ({"method": "bpdq", "options": {"iterations": 1}, "bits": "3"}, 0.02),
    "gptq": ({"method": "gptq", "options": {}, "bits": "3"}, 0.02),
    "nested-tuned": (
        {
            "method": "nested",
            "options": {"iterations": 1, "sweeps": 1, "tune_steps": 2, "tune_tokens": 64},
            "bits": "2,4",
            "dtype": "float32",  # the pretended device has no autocast
        },
        0.02,
    ),
    "rtn-with-head": ({**RTN, "head_bits": 5}, 1e-4),
}


# on a pretended device: one job of each way to the codes, those that tune or train among them
PRETENDED = ("anyprecision", "nested-tuned", "rtn-with-head")


@pytest.mark.parametrize(
    ("gpu", "job"),
    [*(("pretended", job) for job in PRETENDED), *(pytest.param(*REAL.values, job, marks=REAL.marks) for job in JOBS)],
    indirect=["gpu"],
)
def test_a_job_on_the_gpu_is_the_job_on_the_cpu(gpu, job, source, text, tmp_path):
    settings, tolerance = JOBS[job]
    there = run(source, tmp_path / "gpu", text, **settings, device=gpu)
    here = run(source, tmp_path / "cpu", text, **settings)
    assert len(there.results) == len(here.results) > 0
    for mine, expected in zip(there.results, here.results, strict=True):
        assert mine["nll"] == pytest.approx(expected["nll"], rel=tolerance)
        assert mine["kld"] == pytest.approx(expected["kld"], rel=0.2, abs=1e-4)
