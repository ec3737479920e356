"""A job that calibrates on a mix: what it records, and that another share is another job."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from chat_templates import PLAIN, chat_tokenizer
from job_helpers import RTN, run
from tiny_models import tiny_llama, tiny_text

from bitstrata.errors import BitstrataError
from bitstrata.evaluation import evaluate


def test_a_job_takes_a_mix_and_records_it(tmp_path: Path) -> None:
    model, text = tiny_llama(tmp_path / "model"), tiny_text(tmp_path / "text.txt")
    chats = tmp_path / "chats.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "b"}]} for n in range(60)
    ]
    chats.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(BitstrataError, match="need a chat template"):
        run(model, tmp_path / "out", f"{text},{chats}:0.25", **RTN)  # type: ignore[arg-type]
    chat_tokenizer(PLAIN).save_pretrained(model)
    report = run(model, tmp_path / "out", f"{text},{chats}:0.25", **RTN)  # type: ignore[arg-type]
    assert report.heldout_tokens > 0
    provenance = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["provenance"]
    assert provenance["calibration"] == "text.txt:0.75,chats.jsonl:0.25"
    with pytest.raises(BitstrataError, match="text_sha256"):
        run(model, tmp_path / "out", f"{text},{chats}:0.5", **RTN)  # type: ignore[arg-type]
    found = evaluate(tmp_path / "out", chats, bits=4, reference=model, device="cpu")
    assert found.results[0].kld is not None
    assert found.tokens == sum(
        len(chat_tokenizer(PLAIN)(f"=user={n}?</s>=assistant=b</s>").input_ids) - 1 for n in range(60)
    )
