"""Checkpoints on the hub and back: published with a card, loaded by name, through the hub's real client."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import TOKEN, HubServer, hub_server

import bitstrata
from bitstrata.demonstration.run import MODEL
from bitstrata.errors import CheckpointError
from bitstrata.models.publishing import CARD, PICTURE, card, picture


@pytest.fixture(scope="module")
def hub():
    with hub_server() as running:
        yield running


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("published") / "out"
    text = tmp_path_factory.mktemp("text") / "code.txt"
    text.write_text("<|endoftext|>".join(f"def f{n}(value):\n    return value + {n}\n" * 9 for n in range(60)))
    bitstrata.quantize(MODEL, output, bits="2-4", calibration=text, num_samples=4, seq_len=64)
    return output


def call(
    hub: HubServer, cache: Path, *arguments: object, token: str | None = TOKEN, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`bitstrata` in a process of its own, whose hub is ours: the client reads where it is when it is imported."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "HF_ENDPOINT", "HF_HOME")
    own = {name: value for name, value in os.environ.items() if name not in names}
    own |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    own |= environment if token is None else {"HF_TOKEN": token, **environment}
    command = [sys.executable, "-m", "bitstrata.cli.main", *map(str, arguments)]
    return subprocess.run(command, env=own, capture_output=True, text=True, timeout=240)


def test_what_is_pushed_is_what_others_load(hub, checkpoint, tmp_path):
    done = call(hub, tmp_path / "mine", "push", checkpoint, "user/small")
    assert done.returncode == 0, done.stderr
    held = hub.repos["user/small"]["main"]
    files = {path.name: path.read_bytes() for path in checkpoint.iterdir() if path.is_file()}
    assert {name: content for name, content in held.items() if name not in (CARD, PICTURE)} == files
    assert "base_model" not in held[CARD].decode(), "a folder's name is no repository"
    assert held[CARD].decode() == card(checkpoint, "user/small", has_picture=PICTURE in held)
    if importlib.util.find_spec("matplotlib") is not None:
        assert held[PICTURE].startswith(b"\x89PNG")

    hub.requests.clear()
    arguments = ("--max-new-tokens", 6)
    local = call(hub, tmp_path / "none", "generate", f"{checkpoint}:2", "def f", *arguments)
    found = call(hub, tmp_path / "theirs", "generate", "user/small:2", "def f", *arguments, token=None)
    assert found.returncode == 0, found.stderr
    assert found.stdout == local.stdout
    fetched = hub.fetched()
    assert {name for name in fetched if "plane" in name} == {"model-plane-0.safetensors", "model-plane-1.safetensors"}
    again = call(hub, tmp_path / "theirs", "generate", "user/small:2", "def f", *arguments, token=None)
    assert again.stdout == local.stdout
    assert not {name for name in hub.fetched() if name.endswith("safetensors")}, "it is in the cache"


def test_a_private_branch_by_its_name_and_a_token_of_the_call_and_again_without_the_hub(hub, checkpoint, tmp_path):
    files = {path.name: path.read_bytes() for path in checkpoint.iterdir() if path.is_file()}
    hub.repos["user/branches"] = {"main": {}, "two": files}
    hub.private.add("user/branches")
    asked = ("generate", "user/branches:2", "def f", "--max-new-tokens", 4, "--revision", "two")
    kept = ("--cache-dir", tmp_path / "kept")
    found = call(hub, tmp_path / "home", *asked, *kept, "--token", TOKEN, token=None)
    assert found.returncode == 0, found.stderr
    hub.requests.clear()
    again = call(hub, tmp_path / "home", *asked, *kept, token=None, HF_HUB_OFFLINE="1")
    assert (again.returncode, again.stdout) == (0, found.stdout), again.stderr
    assert not hub.requests
    assert not list((tmp_path / "home").rglob("*.safetensors"))
    refused = call(hub, tmp_path / "home", *asked, token=None)
    assert refused.returncode == 3
    assert "the hub did not give it" in refused.stderr


@pytest.mark.slow
def test_a_branch_and_a_private_repository(hub, checkpoint, tmp_path):
    done = call(hub, tmp_path, "push", checkpoint, "user/hidden", "--private", "--revision", "two")
    assert done.returncode == 0, done.stderr
    assert hub.private >= {"user/hidden"}
    assert not hub.repos["user/hidden"]["main"]
    assert CARD in hub.repos["user/hidden"]["two"]
    refused = call(hub, tmp_path / "other", "generate", "user/hidden:2", "x", token=None)
    assert refused.returncode == 3
    assert "the hub did not give it" in refused.stderr


@pytest.mark.slow
def test_whose_readme_it_is(hub, checkpoint, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(checkpoint, own)
    (own / CARD).write_text("# mine")
    (own / ".job").mkdir()
    (own / ".job" / "part").write_text("left over")
    assert call(hub, tmp_path / "cache", "push", own, "user/own").returncode == 0
    assert hub.repos["user/own"]["main"][CARD] == b"# mine"
    assert not any(".job" in name for name in hub.repos["user/own"]["main"])


@pytest.mark.slow
def test_quantize_pushes_what_it_made(hub, tmp_path):
    arguments = ("quantize", MODEL, "-o", tmp_path / "out", "--method", "rtn", "--bits", "2,3")
    refused = call(hub, tmp_path / "cache", *arguments, "--push-to-hub", "user/made", token=None)
    assert refused.returncode == 2
    assert not (tmp_path / "out").exists(), "the token is looked at before the long part"
    done = call(hub, tmp_path / "cache", *arguments, "--push-to-hub", "user/made")
    assert done.returncode == 0, done.stderr
    held = hub.repos["user/made"]["main"]
    files = {path.name for path in (tmp_path / "out").iterdir() if path.is_file()}
    assert files == set(held) - {CARD, PICTURE}
    assert CARD in held


@pytest.mark.parametrize(
    ("repo", "token", "said"),
    [
        ("not a name", TOKEN, "is no name of a repository"),
        ("user/small", None, "the hub does not know who you are"),
        ("user/small", "hf_other", "the hub does not know who you are"),
    ],
    ids=["name", "none", "other"],
)
def test_what_the_hub_would_not_take_is_refused_first(hub, checkpoint, tmp_path, repo, token, said):
    refused = call(hub, tmp_path, "push", checkpoint, repo, token=token)
    assert refused.returncode == 2
    assert said in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_card_says_how_it_was_measured_and_made(checkpoint):
    text = card(checkpoint, "user/small")
    front = text.split("---")[1]
    assert 'tags: ["bitstrata", "quantized", "2-bit", "3-bit", "4-bit"]' in front
    rows = [line for line in text.splitlines() if line.startswith(("| 2 |", "| 3 |", "| 4 |"))]
    assert len(rows) == 3
    for said in (
        "method: nested, preset default",
        "group size: 128",
        "code.txt, 4 windows of 64 tokens, seed 0",
        "sha256",
    ):
        assert said in text
    assert "bitstrata generate user/small:2" in text
    shown = picture(checkpoint)
    assert (shown is None) == (importlib.util.find_spec("matplotlib") is None)


def test_a_folder_without_a_checkpoint(tmp_path):
    with pytest.raises(CheckpointError):
        bitstrata.push(tmp_path, "user/small")
