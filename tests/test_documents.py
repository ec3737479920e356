"""What README, CONTRIBUTING and the guides show can be typed: commands parse, flags exist, files are there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from bitstrata.cli.main import app

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "ARCHITECTURE.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
DOCUMENTS = [path for path in DOCUMENTS if path.name != "log.md"]  # history: what was tried with programs of its day
GUIDES = [path for path in DOCUMENTS if path.parent.name == "guides"]
PROGRAM = typer.main.get_command(app)


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _commands(text: str) -> list[str]:
    """Lines of code blocks and inline code that call the program with arguments."""
    blocks = re.findall(r"^ *```(\w*)\n(.*?)^ *```$", text, flags=re.M | re.S)
    lines = [line.strip() for kind, block in blocks if kind != "python" for line in block.splitlines()]
    text = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.M | re.S)
    inline = re.findall(r"`(bitstrata [a-z]+ [^`]*)`", text.replace("\n", " "))
    shown = [part.strip() for line in lines for part in line.split("&&")] + inline
    return [line.split("  #")[0] for line in shown if re.match(r"bitstrata [a-z]+\b", line) and "..." not in line]


def _parse(command: str) -> None:
    """Let the verb read its arguments, without running it."""
    verb, *arguments = shlex.split(command)[1:]
    context = typer.Context(PROGRAM)
    subcommand = PROGRAM.get_command(context, verb)
    assert subcommand is not None, f"no command {verb}"
    subcommand.make_context(verb, arguments, parent=context)


def _options() -> set[str]:
    context = typer.Context(PROGRAM)
    verbs = [PROGRAM.get_command(context, name) for name in PROGRAM.list_commands(context)]
    parameters = [*PROGRAM.params, *(parameter for verb in verbs for parameter in verb.params)]
    return {"--help"} | {option for parameter in parameters for option in (*parameter.opts, *parameter.secondary_opts)}


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if _commands(_text(path))], ids=_name)
def test_commands_that_are_shown_can_be_typed(path):
    """In running text a command may leave out what the sentence is not about."""
    for command in _commands(_text(path)):
        try:
            _parse(command)
        except Exception as error:
            if type(error).__name__ != "MissingParameter" or f"`{command}`" not in _text(path):
                pytest.fail(f"{command}\n{type(error).__name__}: {error}")


THEIRS = {  # the flags of other programs, in the guides that are about them
    "vllm.md": {
        *("--logits-processors", "--scheduler-cls", "--load-format", "--hf-overrides", "--tensor-parallel-size"),
        *("--pipeline-parallel-size", "--distributed-executor-backend", "--enforce-eager", "--enable-dbo"),
        *("--middleware", "--served-model-name", "--api-server-count", "--head", "--address"),
        *("--speculative-config", "--enable-expert-parallel"),
    },
    "coming-from.md": {
        *("--imatrix", "--tensor-type", "--kl-divergence", "--cache-type-k", "--cache-type-v", "--grammar"),
        *("--json-schema", "--lora", "--hf-token", "--download-dir", "--max-num-seqs", "--max-model-len"),
        *("--enable-lora", "--lora-modules", "--speculative-config", "--resume"),
    },
    "installing.md": {"--output-dir"},
    "clients.md": {"--apply", "--model", "--tasks"},
}


@pytest.mark.parametrize("path", GUIDES, ids=_name)
def test_flags_that_are_named_exist(path):
    others = r"`?(?:hf|pip|pytest|python|torchrun|llama-perplexity|lm_eval) [^`\n]*"
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", re.sub(others, "", _text(path))))
    known = _options() | THEIRS.get(path.name, set())
    assert named <= known, sorted(named - known)


@pytest.mark.parametrize("path", DOCUMENTS, ids=_name)
def test_files_that_are_named_exist(path):
    named = re.findall(r"`((?:benchmarks|tests|tools|docs|src)/[\w./*-]+)`", _text(path))
    missing = [name for name in named if not list(ROOT.glob(name.rstrip("/")))]
    assert not missing


def test_a_wrong_command_is_noticed():
    assert _commands("```python\nx\n```\n```console\nbitstrata env\n```\nand `bitstrata inspect\nOUT`") == [
        "bitstrata env",
        "bitstrata inspect OUT",
    ]
    with pytest.raises(Exception, match="no-such-flag"):
        _parse("bitstrata quantize MODEL -o OUT --no-such-flag")
