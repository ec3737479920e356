"""`--adapter`: a LoRA adapter beside the planes, on the command line."""

from __future__ import annotations

import io

import peft
from cli_outcome import Command

import bitstrata


def test_generate_and_chat_run_it(quantized, cli: Command, tmp_path, monkeypatch):
    model = bitstrata.load(quantized)
    model.add_adapter(peft.LoraConfig(r=4, lora_alpha=64, target_modules="all-linear", init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    generate = ("generate", f"{quantized}:2", "the cat", "--max-new-tokens", "12")
    flag = ("--adapter", tmp_path / "adapter")
    plain, adapted = cli(*generate), cli(*generate, *flag)
    assert adapted.code == plain.code == 0, adapted.err
    assert adapted.out != plain.out
    monkeypatch.setattr("sys.stdin", io.StringIO("the cat\n"))
    talk = cli("chat", f"{quantized}:2", "--max-new-tokens", "12", "--temperature", "0", *flag)
    assert talk.out.strip() == adapted.out.strip().removeprefix("the cat")
    (tmp_path / "empty").mkdir()
    cli(*generate, "--adapter", tmp_path / "empty").refused(3, "holds no adapter", "adapter_config.json")
    cli(*generate, "--adapter", tmp_path / "none").refused(3, "none cannot be used")
