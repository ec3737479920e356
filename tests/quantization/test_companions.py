"""What goes into a checkpoint beside weights: what loaders need of the source's folder, and nothing from elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_llama, tiny_tokenizer
from transformers import AutoTokenizer

import bitstrata

TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


def rtn(source: Path, output: Path) -> bitstrata.Report:
    return bitstrata.quantize(source, output, bits=2, method="rtn", group_size=16)


def extend(path: Path, **settings: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def test_templates_and_processor_files_come_along(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": TEMPLATE, "tools": TEMPLATE + "tools"}
    tokenizer.save_pretrained(source)
    assert (source / "additional_chat_templates" / "tools.jinja").is_file()
    names = ["preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"]
    for name in names:
        (source / name).write_text(json.dumps({"size": 7}))
    (source / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    (source / "training_args.bin").write_bytes(b"no business of ours")
    rtn(source, tmp_path / "out")
    for name in [*names, "chat_template.json", "additional_chat_templates/tools.jinja"]:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes(), name
    assert not (tmp_path / "out" / "training_args.bin").exists()
    copied = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert copied.chat_template == tokenizer.chat_template


def test_what_makes_an_embedding_of_hidden_states_comes_along(tmp_path: Path) -> None:
    """Beside a model of sentence-transformers: the list of its modules, how it pools, and a layer behind that."""
    source = tiny_llama(tmp_path / "source")
    modules = [{"idx": 0, "path": "", "type": "x.Transformer"}, {"idx": 1, "path": "1_Pooling", "type": "x.Pooling"}]
    files = {
        "modules.json": json.dumps(modules).encode(),
        "sentence_bert_config.json": b'{"max_seq_length": 32}',
        "config_sentence_transformers.json": b'{"prompts": {"query": "q: "}}',
        "1_Pooling/config.json": b'{"pooling_mode_lasttoken": true}',
        "2_Dense/config.json": b'{"in_features": 64, "out_features": 8}',
        "2_Dense/model.safetensors": b"weights of a layer",
    }
    for name, content in {**files, "onnx/model.safetensors": b"another copy"}.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(content)
    rtn(source, tmp_path / "out")
    copied = {name: tmp_path / "out" / name for name in files}
    assert {name: path.read_bytes() for name, path in copied.items()} == files
    assert not (tmp_path / "out" / "onnx").exists()


@pytest.mark.parametrize(
    "name", ["LICENSE_x", "2_Dense/model.safetensors", "tokenizer.x", "additional_chat_templates/x.jinja"]
)
def test_a_link_out_of_the_source_is_not_published(name: str, tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source")
    (tmp_path / "secret").write_text("secret")
    (source / name).parent.mkdir(exist_ok=True)
    (source / name).symlink_to(tmp_path / "secret")
    (source / "LICENSE").write_text("a licence")
    (source / "NOTICE").symlink_to(source / "LICENSE")  # within the folder
    report = rtn(source, tmp_path / "out")
    assert not (tmp_path / "out" / name).exists()
    assert (tmp_path / "out" / "NOTICE").read_text() == "a licence"
    assert [note for note in report.notes if "link" in note] == [f"{name} is a link out of {source} and is not copied"]


def test_a_snapshot_of_the_hub_consists_of_links_which_are_followed(tmp_path: Path) -> None:
    home = tmp_path / "models--org--model"
    blobs, snapshot = home / "blobs", home / "snapshots" / "0123"
    tiny_llama(blobs)
    (blobs / "LICENSE").write_text("a licence")
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    (tmp_path / "models--org--other").mkdir()
    (tmp_path / "models--org--other" / "x").write_text("another model's")
    (snapshot / "NOTICE").symlink_to(tmp_path / "models--org--other" / "x")
    report = rtn(snapshot, tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE"):
        assert (tmp_path / "out" / name).read_bytes() == (blobs / name).read_bytes()
    assert not (tmp_path / "out" / "NOTICE").exists()
    assert sum("link" in note for note in report.notes) == 1


def test_code_that_is_not_copied_is_not_named(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source")
    code = {"auto_map": {"AutoConfig": "elsewhere/code--configuration.Config"}}
    extend(source / "config.json", **code)
    extend(source / "tokenizer_config.json", **code)
    (source / "processor_config.json").write_text(json.dumps({**code, "inner": {**code, "size": 7}}))
    report = rtn(source, tmp_path / "out")
    for name in ("config.json", "tokenizer_config.json", "processor_config.json"):
        assert "auto_map" not in (tmp_path / "out" / name).read_text(), name
        assert any(note.startswith(f"{name}: auto_map is left out") for note in report.notes)
    assert json.loads((tmp_path / "out" / "processor_config.json").read_text()) == {"inner": {"size": 7}}
    before, after = (
        json.loads((folder / "tokenizer_config.json").read_text()) for folder in (source, tmp_path / "out")
    )
    assert after == {key: value for key, value in before.items() if key != "auto_map"}
    bitstrata.load(tmp_path / "out")
