"""Every architecture of transformers comes out right, or is refused in words; docs/reference/models.md says which."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import shrunk
import sweep
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

import bitstrata
from bitstrata.errors import PreflightError

PAGE = sweep.PAGE.read_text(encoding="utf-8")
ROWS = sweep.rows_of(PAGE)
# One of each way to hold blocks, projections, tied heads, states and towers; the others run with make test-slow.
REPRESENTATIVE = {
    "bart", "bert", "bloom", "cohere2", "falcon", "gemma3", "gpt2", "gpt_bigcode", "gpt_neox", "llama", "minicpm3",
    "mpt", "opt", "phi3", "reformer", "xlm", "xlstm",
    "falcon_h1", "gemma3n_text", "gemma4", "lfm2", "mamba2", "mistral3", "qwen3_5", "qwen3_vl", "recurrent_gemma",
    "rwkv", "zamba2", "cpmant", "gpt_oss", "idefics", "kimi_k25", "mixtral", "step3p7",
}  # fmt: skip
# of the families that people download
NAMED = {
    "deepseek_v2", "deepseek_v3", "deepseek_v4", "ernie4_5_moe", "glm4_moe", "gpt_oss", "granitemoe", "llama4_text",
    "minimax_m2", "mixtral", "nemotron_h", "olmoe", "qwen2_moe", "qwen3_5_moe", "qwen3_moe", "qwen3_next",
    "bamba", "falcon_h1", "gemma3", "gemma3_text", "gemma3n_text", "gemma4", "gemma4_text", "lfm2", "lfm2_vl", "llama",
    "mamba2", "minicpm3", "ministral3", "mistral3", "qwen3", "qwen3_5", "qwen3_5_text", "qwen3_vl",
}  # fmt: skip


def architectures() -> list[Any]:
    return [pytest.param(name, marks=[] if name in REPRESENTATIVE else [pytest.mark.slow]) for name in sweep.names()]


@pytest.mark.parametrize("name", architectures())
def test_it_becomes_what_the_page_says(name: str, tmp_path: Path) -> None:
    outcome = sweep.attempt(name, tmp_path)
    if f"transformers {transformers.__version__} " in PAGE:
        assert str(outcome) == ROWS[name], "python tools/models_page.py writes the page anew"


def test_nearly_all_language_models_work() -> None:
    status = {name: row.split(" | ")[2] for name, row in ROWS.items()}
    works = [name for name, said in status.items() if said == "yes"]
    counted = [name for name, said in status.items() if said in ("yes", "not yet")]
    assert len(works) >= 0.95 * len(counted)
    assert set(works) >= NAMED
    assert not any("FAILED" in row for row in ROWS.values())
    if f"transformers {transformers.__version__} " in PAGE:
        assert ROWS.keys() >= set(sweep.names())


@pytest.mark.parametrize("name", ["bert", "cpmant", "roberta", "xlm", "xlnet"])
def test_an_encoder_is_refused(name: str, tmp_path: Path) -> None:
    config = shrunk.shrunk(name)
    config.is_decoder = config.causal = False
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source")
    with pytest.raises(PreflightError, match="sees later tokens"):
        bitstrata.quantize(tmp_path / "source", tmp_path / "out", bits=2, method="rtn", group_size=16)
    assert not (tmp_path / "out").exists()


def test_the_rules_for_tiny_configs_keep_one_layer_of_each_kind() -> None:
    config = shrunk.shrunk("qwen3_5_text")
    assert config.layer_types == ["linear_attention", "full_attention"]
    assert AutoConfig.for_model("qwen3_5_text").layer_types.count("linear_attention") > 2
