"""auto-round (Intel): rounding and ranges tuned block by block with signed gradients (SignRound), on the CPU.

    auto-round:bits=2:group_size=128:iters=200

Asymmetric, on the job's own windows, everything else as the library has it. It works on the model in bf16, as its own
command does. Bytes are those of its packed files: codes, a fp16 scale and a zero of `bits` for each group.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import torch

from bitstrata.errors import CheckError
from bitstrata.models import load_tokenizer

from .made import Job, Made, Options, linears_of, taken

BATCH = 8


def missing() -> str | None:
    return None if importlib.util.find_spec("auto_round") else "auto_round cannot be imported"


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {"auto-round": version("auto-round")}


def make(job: Job, options: Options) -> Iterator[Made]:
    from auto_round import AutoRound

    bits, group = int(taken(options, "bits", "2")), int(taken(options, "group_size", "128"))
    iters = int(taken(options, "iters", "200"))
    model = job.loaded(torch.bfloat16)
    before = {name: linear.weight.detach().clone() for name, linear in linears_of(model).items()}
    rounder = AutoRound(
        model,
        tokenizer=load_tokenizer(job.model),
        scheme={"bits": bits, "group_size": group, "sym": False, "data_type": "int", "act_bits": 16},
        dataset=list(job.windows.split(BATCH)),
        iters=iters,
        seqlen=job.windows.shape[1],
        nsamples=len(job.windows),
        batch_size=BATCH,
        device_map="cpu",
        enable_torch_compile=False,
        seed=job.seed + 42,
    )
    rounder.quantize()
    weights, size = {}, 0
    for name, linear in linears_of(rounder.model).items():
        outs, columns = linear.weight.shape
        groups = -(-columns // group)
        if torch.equal(linear.weight.detach(), before[name]):
            raise CheckError(f"auto-round left {name} as it was")
        weights[f"{name}.weight"] = linear.weight.detach().float().contiguous()
        size += (outs * columns * bits + outs * groups * (16 + bits)) // 8
    yield Made(bits, weights, size)
