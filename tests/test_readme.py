"""The README's commands do what it says: every `console` line runs, in order, as a reader would type it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_llama, tiny_text

import bitstrata
from bitstrata.cli.main import run
from bitstrata.demonstration.run import MODEL
from bitstrata.nn import bits_state

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"^```console\n(.*?)^```", README.read_text(encoding="utf-8"), flags=re.M | re.S)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line.startswith("bitstrata ")]


def test_the_readme_shows_the_verbs():
    assert {command.split()[1] for command in COMMANDS} >= {"demo", "quantize", "eval", "generate", "inspect", "env"}


@pytest.mark.slow
def test_every_command_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny_llama(tmp_path / "MODEL")
    for name in ("text.txt", "heldout.txt"):
        tiny_text(tmp_path / name)
    for command in COMMANDS:
        code = run(shlex.split(command)[1:])
        captured = capsys.readouterr()
        assert code == 0, f"{command}\n{captured.err}"
        assert captured.out.strip(), command
    _check_what_the_demo_left(tmp_path / "demo-model")


def _check_what_the_demo_left(folder: Path) -> None:
    """The demo's model is a real one: each precision is closer to the original than the one below."""
    model = bitstrata.load(folder)
    assert bits_state(model).supported == (2, 3, 4)
    evaluation = bitstrata.evaluate(folder, "stdlib", reference=MODEL, seq_len=256, max_tokens=3000)
    kld = [row.kld for row in evaluation.results]
    nll = [row.nll for row in evaluation.results]
    assert kld[0] > kld[1] > kld[2] > 0
    assert nll[0] > nll[1] > nll[2] > evaluation.reference["nll"]
    assert kld[0] < 0.4
    with torch.no_grad():
        ids = torch.randint(0, 4096, (2, 16), generator=torch.Generator().manual_seed(0))
        mixed = model(ids, bits=torch.tensor([2, 4])).logits
        torch.testing.assert_close(mixed[1], model(ids, bits=4).logits[1], rtol=0.05, atol=0.5)
