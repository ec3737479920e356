"""What the weights take in a vLLM server: the plugin at several `max_bits`, beside vLLM's own bf16.

A random model of a known shape is written once; each server loads it, answers a request, and is asked for the memory
that its processes have for themselves (USS). Most of that is vLLM's own and the same for all, so what is printed beside
it is the difference to the first server, and the bytes of the tensors that each of them reads.

    python benchmarks/vllm_memory.py FOLDER [--shape llama-3.2-1b] [--blocks N] [--max-bits 2,3,4] [--json FILE]

FOLDER keeps the model for another run. The bf16 server has random weights of vLLM's (`--load-format dummy`). To be run
with the Python of vLLM's environment.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Container
from itertools import chain
from pathlib import Path
from typing import Any

import psutil
import torch
from common import random_checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

from bitstrata.benchmark.random_model import SHAPES, shape_config
from bitstrata.checkpoint import CheckpointReader
from bitstrata.checkpoint.schema import tensor_bytes

START_LIMIT = 600  # seconds


def write_models(folder: Path, shape: str, bits: tuple[int, ...], blocks: int | None) -> None:
    """A model of planes in `folder`/planes and the config of an ordinary one in `folder`/dense, if not there yet."""
    if (folder / "planes").exists():
        return
    random_checkpoint(folder / "new", shape_config(shape), bits, blocks=blocks)
    config: dict[str, Any] = json.loads((folder / "new" / "config.json").read_text())
    config.pop("quantization_config")
    (folder / "dense").mkdir(exist_ok=True)
    (folder / "dense" / "config.json").write_text(json.dumps(config))
    (folder / "new").rename(folder / "planes")


def stored_bytes(folder: Path, max_bits: int, held: Container[str]) -> int:
    """Of all tensors that a server up to these bits keeps; `held`: parameters of the model, tied ones once."""
    reader = CheckpointReader(folder, max_bits=max_bits)
    layers = (reader.spec.layer_tensors(name, max_bits).values() for name in reader.spec.layers)
    common = (reader.tensor_spec(name) for name in reader.common_names() if name in held)
    return sum(map(tensor_bytes, chain(*layers, common)))


def server_memory(model: Path, *flags: str) -> int:
    """USS of a server's processes after one request, in bytes."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = int(one.getsockname()[1])
    program = Path(sys.executable).with_name("vllm")
    run = [str(program), "serve", str(model), "--dtype", "bfloat16", "--enforce-eager", "--skip-tokenizer-init"]
    env = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_CI_ENV": "1", "HF_HUB_OFFLINE": "1", **os.environ}
    process = subprocess.Popen(
        [*run, "--max-model-len", "256", "--port", str(port), *flags],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=env,
        start_new_session=True,
    )
    try:
        body = {"model": str(model), "prompt": list(range(3, 35)), "max_tokens": 4, "return_token_ids": True}
        data = json.dumps(body | {"detokenize": False}).encode()
        end = time.monotonic() + START_LIMIT
        while True:
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"the server of {model} did not start: {' '.join(run)} {' '.join(flags)}")
            try:
                address = f"http://127.0.0.1:{port}/v1/completions"
                request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
                urllib.request.urlopen(request, timeout=120).close()
                break
            except urllib.error.HTTPError as error:
                raise SystemExit(error.read().decode()) from None
            except OSError:
                time.sleep(0.5)
        first = psutil.Process(process.pid)
        return sum(one.memory_full_info().uss for one in (first, *first.children(recursive=True)))
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-3.2-1b")
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--max-bits", default="2,3,4")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    bits = tuple(int(value) for value in options.max_bits.split(","))
    write_models(options.folder, options.shape, bits, options.blocks)
    planes = options.folder / "planes"
    with torch.device("meta"):
        dense = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(options.folder / "dense"))
    parameters = dict(dense.named_parameters())
    rows: list[dict[str, Any]] = []

    def measure(name: str, stored: int, model: Path, *flags: str) -> None:
        rows.append({"name": name, "uss_bytes": server_memory(model, *flags), "stored_bytes": stored})
        used, more = rows[-1], {key: (rows[-1][key] - rows[0][key]) / 2**20 for key in ("uss_bytes", "stored_bytes")}
        print(
            f"{name:12} {used['uss_bytes'] / 2**20:7.0f} MiB  {more['uss_bytes']:+7.0f}"
            f"    tensors {stored / 2**20:7.0f} MiB  {more['stored_bytes']:+7.0f}",
            flush=True,
        )
        if options.json:  # after each: a later server may not start
            options.json.write_text(
                json.dumps({"shape": options.shape, "blocks": options.blocks, "rows": rows}, indent=1)
            )

    for value in bits:
        limit = json.dumps({"bitstrata": {"max_bits": value}})
        stored = stored_bytes(planes, value, parameters)
        measure(f"max_bits {value}", stored, planes, "--load-format", "bitstrata", "--hf-overrides", limit)
    whole = 2 * sum(one.numel() for one in parameters.values())
    measure("bf16", whole, options.folder / "dense", "--load-format", "dummy")


if __name__ == "__main__":
    main()
