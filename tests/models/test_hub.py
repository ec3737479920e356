"""What is fetched from the hub: a pretended one, laid out on disk as the real client lays out its cache."""

from __future__ import annotations

import fnmatch
import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_llama

import bitstrata
from bitstrata.cli.main import run
from bitstrata.errors import BitstrataError, ModelError
from bitstrata.models import load_tokenizer, resolve
from bitstrata.models.source import SourceModel

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Repositories under `root`, and a cache.

    asked: the files that were fetched. access: every call's revision, token and folder. online: whether it answers.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.cache = root / "hub", root / "cache"
        self.asked: list[str] = []
        self.access: set[tuple[str, str | None, str | None, str | None]] = set()
        self.online = True

    def publish(self, repo: str, folder: Path) -> Path:
        return Path(shutil.copytree(folder, self.root / repo))

    def snapshot_download(
        self,
        repo_id: str,
        *,
        revision: str | None = None,
        allow_patterns: list[str] | None = None,
        local_files_only: bool = False,
        token: str | None = None,
        cache_dir: str | None = None,
    ) -> str:
        assert revision in (None, "two", COMMIT), "all parts must be of the same revision"
        self.access.add((repo_id, revision, token, cache_dir))
        home = self.cache / f"models--{repo_id.replace('/', '--')}"
        snapshot = home / "snapshots" / COMMIT
        published = self.root / repo_id
        files = [path.relative_to(published).as_posix() for path in published.rglob("*") if path.is_file()]
        wanted = [file for file in files if any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns or "*")]
        if not self.online or local_files_only:
            lacking = [file for file in wanted if not (snapshot / file).exists()]
            if lacking or not snapshot.is_dir():
                raise FileNotFoundError(f"not in the cache: {lacking}")
            return str(snapshot)
        if not published.is_dir():
            raise FileNotFoundError(f"no repository {repo_id}")
        for file in wanted:
            if (snapshot / file).exists():
                continue
            self.asked.append(file)
            blob = home / "blobs" / file.replace("/", "-")
            blob.parent.mkdir(parents=True, exist_ok=True)
            (snapshot / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(published / file, blob)
            (snapshot / file).symlink_to(blob)
        return str(snapshot)

    def weights(self) -> set[str]:
        return {file for file in self.asked if file.endswith((".safetensors", ".bin"))}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", made.snapshot_download)
    return made


def rtn(source: str | Path, output: Path, bits: str = "2-4", **settings: Any) -> Path:
    bitstrata.quantize(source, output, bits=bits, method="rtn", group_size=16, **settings)
    return output


def in_shards(folder: Path) -> None:
    """The model in `folder` in two shards; one of them in a sub-folder."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {name: "one.safetensors" if "layers.0" in name else "part/two.safetensors" for name in tensors}
    for file in set(files.values()):
        (folder / file).parent.mkdir(exist_ok=True)
        save_file({name: tensors[name] for name in tensors if files[name] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def other_copies(folder: Path) -> None:
    for name in ("consolidated.safetensors", "model.fp16.safetensors", "pytorch_model.bin", "original/x.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"large")


@pytest.mark.parametrize("shards", [False, True])
def test_a_source_costs_the_weights_that_transformers_loads(hub: Hub, shards: bool, tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source")
    expected = {"model.safetensors"}
    if shards:
        in_shards(source)
        expected = {"one.safetensors", "part/two.safetensors"}
    other_copies(source)
    hub.publish("org/model", source)
    out, local = rtn("org/model", tmp_path / "out"), rtn(source, tmp_path / "local")
    assert hub.weights() == expected
    for name in ("model-common.safetensors", "model-plane-0.safetensors", "model-bits-4.safetensors"):
        assert (out / name).read_bytes() == (local / name).read_bytes()
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()  # a link into the blobs


def test_where_both_are_published_the_single_file_is_fetched_alone(hub: Hub, tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source")
    whole = (source / "model.safetensors").read_bytes()
    in_shards(source)
    (source / "model.safetensors").write_bytes(whole)
    hub.publish("org/model", source)
    resolve("org/model")
    assert hub.weights() == {"model.safetensors"}


def test_a_named_weights_file_is_the_one_that_is_fetched(hub: Hub, tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "transformers_weights": "this.safetensors"}))
    shutil.copy(source / "model.safetensors", source / "this.safetensors")
    hub.publish("org/model", source)
    SourceModel(resolve("org/model"))
    assert hub.weights() == {"this.safetensors"}


def test_a_checkpoint_costs_the_planes_and_scales_of_the_bits_asked_for(hub: Hub, tmp_path: Path) -> None:
    out = rtn(tiny_llama(tmp_path / "source"), tmp_path / "out", "2-4")
    hub.publish("org/quantized", out)
    model = bitstrata.load("org/quantized", max_bits=2)
    two = {"model-common", "model-plane-0", "model-plane-1", "model-bits-2"}
    assert hub.weights() == {f"{name}.safetensors" for name in two}
    ids = torch.randint(3, 60, (1, 12))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, bitstrata.load(out, max_bits=2)(ids).logits)
        three = bitstrata.load("org/quantized", max_bits=3)
        assert hub.weights() == {f"{name}.safetensors" for name in two | {"model-plane-2", "model-bits-3"}}
        assert torch.equal(three(ids).logits, bitstrata.load(out, max_bits=3)(ids).logits)
    bitstrata.load("org/quantized")
    assert hub.weights() == {path.name for path in out.glob("*.safetensors")}
    assert len(hub.asked) == len(set(hub.asked))


def test_a_head_in_planes_is_fetched_whatever_the_bits(hub: Hub, tmp_path: Path) -> None:
    out = rtn(tiny_llama(tmp_path / "source", tie_word_embeddings=True), tmp_path / "out", "2,3", head_bits=6)
    hub.publish("org/quantized", out)
    bitstrata.load("org/quantized", max_bits=2)
    assert "model-head.safetensors" in hub.weights()
    assert not {"model-plane-2.safetensors", "model-bits-3.safetensors"} & hub.weights()


def test_a_model_that_can_be_resized_gets_all_pages(hub: Hub, tmp_path: Path) -> None:
    out = rtn(tiny_llama(tmp_path / "source"), tmp_path / "out", "2-4")
    hub.publish("org/quantized", out)
    model = bitstrata.load("org/quantized", plan=2)
    assert hub.weights() == {path.name for path in out.glob("*.safetensors")}
    model.resize(4)


def test_a_tokenizer_costs_no_weights(hub: Hub, tmp_path: Path) -> None:
    hub.publish("org/model", tiny_llama(tmp_path / "source"))
    assert len(load_tokenizer(resolve("org/model", weights=False))) == 64
    assert hub.weights() == set()


def test_without_the_hub_what_is_in_the_cache_is_enough(hub: Hub, tmp_path: Path) -> None:
    out = rtn(tiny_llama(tmp_path / "source"), tmp_path / "out", "2-4")
    published = hub.publish("org/quantized", out)
    bitstrata.load("org/quantized", max_bits=2)
    (published / "onnx").mkdir()
    (published / "onnx" / "config.json").write_text("{}")  # in the repository, but never fetched
    hub.online = False
    assert bitstrata.load("org/quantized", max_bits=2).generate is not None
    with pytest.raises(BitstrataError, match="model-plane-3"):
        bitstrata.load("org/quantized")
    with pytest.raises(ModelError, match="the hub did not give it"):
        resolve("org/unknown")


def test_a_repository_without_safetensors_is_refused(hub: Hub, tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    hub.publish("org/model", source)
    with pytest.raises(ModelError, match=r"has no model\.safetensors"):
        SourceModel(resolve("org/model"))
    assert hub.weights() == set()


def test_an_index_cannot_ask_for_patterns_or_other_places(hub: Hub, tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source")
    (source / "model.safetensors").rename(source / "a.safetensors")
    other_copies(source)
    index = source / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "*.safetensors"}}))
    hub.publish("org/pattern", source)
    with pytest.raises(ModelError):
        SourceModel(resolve("org/pattern"))
    index.write_text(json.dumps({"weight_map": {"x": "../a.safetensors"}}))
    hub.publish("org/outside", source)
    with pytest.raises(ModelError, match="is not a file name"):
        resolve("org/outside")
    assert hub.weights() == set()


VERBS = {
    "load": lambda hub, folder: bitstrata.load("org/quantized", **hub),
    "a plan": lambda hub, folder: bitstrata.load("org/quantized", plan=2, **hub),
    "eval": lambda hub, folder: bitstrata.evaluate("org/quantized", folder / "text.txt", "2", seq_len=16, **hub),
    "inspect": lambda hub, folder: bitstrata.inspect("org/quantized", **hub),
    "export": lambda hub, folder: bitstrata.export_model("org/quantized", folder / "dense", format="dense", **hub),
    "plan": lambda hub, folder: bitstrata.plan(
        "org/quantized", "6bpw", "waterfill", windows=2, seq_len=8, text=folder / "text.txt", **hub
    ),
    "quantize": lambda hub, folder: rtn("org/model", folder / "out", **hub),
    "generate": lambda hub, folder: run(["generate", "org/quantized:2", "x", *flags(hub)]),
}


def flags(hub: dict[str, str]) -> list[str]:
    return [part for name, value in hub.items() for part in (f"--{name.replace('_', '-')}", value)]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_asks_for_the_revision_with_the_token_and_keeps_it_in_the_folder(
    hub: Hub, verb: str, tmp_path: Path
) -> None:
    source = tiny_llama(tmp_path / "source")
    hub.publish("org/quantized", rtn(source, tmp_path / "quantized"))
    hub.publish("org/model", source)
    (tmp_path / "text.txt").write_text("a b c d e f g h " * 40)
    VERBS[verb]({"revision": "two", "token": "hf_secret", "cache_dir": "kept"}, tmp_path)
    repo = "org/model" if verb == "quantize" else "org/quantized"
    assert {repo} == {call[0] for call in hub.access}
    assert {call[1] for call in hub.access} <= {"two", COMMIT}
    assert {call[2:] for call in hub.access} == {("hf_secret", "kept")}
    if verb == "quantize":
        written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
        assert not any(b"hf_secret" in path.read_bytes() for path in written)


def test_a_reference_has_revisions_of_its_own(hub: Hub, tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source")
    hub.publish("org/quantized", rtn(source, tmp_path / "quantized"))
    hub.publish("org/model", source)
    (tmp_path / "text.txt").write_text("a b c d e f g h " * 40)
    access = {"revision": "two", "token": "hf_secret"}
    bitstrata.evaluate("org/quantized", tmp_path / "text.txt", "2", "org/model", seq_len=16, **access)
    assert {call[1:3] for call in hub.access if call[0] == "org/model"} == {(None, "hf_secret"), (COMMIT, "hf_secret")}
    assert ("org/quantized", "two", "hf_secret", None) in hub.access


def test_an_adapter_has_revisions_of_its_own(hub: Hub, tmp_path: Path) -> None:
    out = rtn(tiny_llama(tmp_path / "source"), tmp_path / "quantized")
    hub.publish("org/quantized", out)
    made = bitstrata.load(out)
    made.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    made.save_pretrained(tmp_path / "adapter")
    hub.publish("org/adapter", tmp_path / "adapter")
    access = {"revision": "two", "token": "hf_secret", "cache_dir": "kept"}
    found = bitstrata.load("org/quantized", adapter="org/adapter", **access)
    assert {call[1:] for call in hub.access if call[0] == "org/adapter"} == {(None, "hf_secret", "kept")}
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        assert torch.equal(found(ids).logits, bitstrata.load(out, adapter=tmp_path / "adapter")(ids).logits)
        assert not torch.equal(found(ids).logits, bitstrata.load(out)(ids).logits)


def test_a_token_is_not_shown() -> None:
    assert "hf_secret" not in repr(bitstrata.EvaluateOptions("org/model", token="hf_secret"))


@pytest.mark.parametrize("bits", [2, None])
def test_the_real_client_serves_a_cached_snapshot_offline(
    bits: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its cache as `huggingface_hub` lays it out, with all that is needed for two bits."""
    out = rtn(tiny_llama(tmp_path / "source"), tmp_path / "out", "2-4")
    made = Hub(tmp_path)
    made.publish("org/quantized", out)
    made.snapshot_download("org/quantized", allow_patterns=["*.json", "*common*", "*plane-[01]*", "*bits-2*"])
    reference = made.cache / "models--org--quantized" / "refs" / "main"
    reference.parent.mkdir()
    reference.write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(made.cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    if bits is None:
        with pytest.raises(
            BitstrataError, match=r"model-plane-2\.safetensors is missing|the hub did not give it: Cannot reach"
        ):
            bitstrata.load("org/quantized")
    else:
        assert bitstrata.load("org/quantized", max_bits=bits).dtype == torch.float32
