"""Where does the time of a step go in vLLM on a CPU, with the plugin and without it?

Runs 32 requests at once in this process, first prompts alone and then with 15 new tokens each, and the latter once more
under a profiler: what takes longest, each without what it calls.

    python benchmarks/vllm_profile.py MODEL [--bits 2 | --bits 2,3,4] [--requests 32] [--lines 20]

Requests take the bits in turns. MODEL without planes is run by vLLM alone. To be run with the Python of vLLM's
environment; `VLLM_CPU_OMP_THREADS_BIND=nobind OMP_NUM_THREADS=2` gives it two threads.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import random
import statistics
import time

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # read when vLLM is imported
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
PROMPT, NEW = 40, 16  # tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--bits", type=lambda text: [int(value) for value in text.split(",")])
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--lines", type=int, default=20)
    options = parser.parse_args()

    from vllm import LLM, SamplingParams

    flags = {"dtype": "bfloat16", "max_model_len": 256, "enforce_eager": True, "enable_prefix_caching": False}
    if options.bits:
        from bitstrata.integrations.vllm.requests import RequestBits

        flags["logits_processors"] = [RequestBits]
    llm = LLM(options.model, **flags)
    draw = random.Random(0)

    def run(count: int) -> float:
        bits = options.bits or [None]
        asked = [None if (one := bits[i % len(bits)]) is None else {"bits": one} for i in range(options.requests)]
        params = [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, extra_args=one) for one in asked]
        prompts = [{"prompt_token_ids": [draw.randrange(5, 4000) for _ in range(PROMPT)]} for _ in asked]
        began = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - began

    run(NEW)
    for count in (1, NEW):
        seconds = [run(count) for _ in range(3)]
        print(
            f"{count:3} tokens: {statistics.median(seconds):.3f} s, {min(seconds):.3f} to {max(seconds):.3f}",
            flush=True,
        )
    profile = cProfile.Profile()
    profile.runcall(run, NEW)
    pstats.Stats(profile).sort_stats("tottime").print_stats(options.lines)


if __name__ == "__main__":
    main()
