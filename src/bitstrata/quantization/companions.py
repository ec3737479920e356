"""What a checkpoint takes over from its source beside weights: config.json, tokenizer, templates, licence.

The result is what people publish. So nothing is copied through a link that leads out of the source,
and `auto_map`, which makes a loader that trusts remote code run files by name, is taken out: those
files are not copied.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from ..checkpoint import copy_file, write_json
from ..checkpoint.reader import read_json
from ..checkpoint.schema import CONFIG_FILE
from ..errors import CheckpointError
from ..models import SourceModel
from ..progress import note

COPIED_FILES = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model", "*.jinja",
    "chat_template.json", "additional_chat_templates/*.jinja", "generation_config.json", "processor_config.json",
    "preprocessor_config.json", "video_preprocessor_config.json", "LICENSE*", "NOTICE*",
    # an embedding model's, by sentence-transformers: its modules after the model are in 1_Pooling, 2_Dense, ...
    "modules.json", "config_sentence_transformers.json", "sentence_*_config.json", "[0-9]_*/*.json",
    "[0-9]_*/model.safetensors",
)  # fmt: skip
CODE = "auto_map"


class Located(Protocol):
    """A model, or a checkpoint, in a folder."""

    @property
    def folder(self) -> Path: ...


def companions(source: Located) -> list[Path]:
    """The files beside the weights that a checkpoint of `source` gets a copy of, without those that lie elsewhere."""
    return [path for path in _matching(source.folder) if _is_own(source.folder, path)]


def note_companions(source: SourceModel) -> None:
    """Say what of the source's files will not be in the result as it is."""
    for path in _matching(source.folder):
        if not _is_own(source.folder, path):
            note(f"{path.relative_to(source.folder)} is a link out of {source.folder} and is not copied")
    for path in (source.folder / CONFIG_FILE, *companions(source)):
        if CODE in _settings(path):
            note(f"{path.name}: auto_map is left out, because the code that it names is not copied")


def copy_companions(source: Located, output: Path) -> None:
    """Copy them; each appears whole or not at all."""
    for path in companions(source):
        target = output / path.relative_to(source.folder)
        target.parent.mkdir(exist_ok=True)
        settings = _settings(path)
        if CODE in settings:
            write_json(target, _without_code(settings))
        else:
            copy_file(path, target)


def checkpoint_config(source: SourceModel) -> dict[str, Any]:
    """The source's config.json as the checkpoint's, `quantization_config` excepted.

    It says the dtype where the source leaves that to be found in the weights: the first floating
    tensor of a checkpoint is one of our scales. It ties nothing where the source stores both sides
    of a tie and they differ. It names no file of the source's.
    """
    config = _without_code(read_json(source.folder / CONFIG_FILE))
    config.pop("transformers_weights", None)
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        part.pop("quantization_config", None)  # of a source in few bits, which were read as numbers
    name = str(source.dtype).removeprefix("torch.")
    nested = [key for key in source.config.sub_configs if isinstance(config.get(key), dict)]
    text = source.config.get_text_config(decoder=True)
    for part, parsed in [(config, source.config), *((config[key], getattr(source.config, key)) for key in nested)]:
        if (parsed is source.config or parsed is text) and not (part.get("dtype") or part.get("torch_dtype")):
            part["dtype"] = name
        if source.untied and (part is config or "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = False
    return config


def _matching(folder: Path) -> list[Path]:
    return sorted({path for pattern in COPIED_FILES for path in folder.glob(pattern) if path.is_file()})


def _is_own(folder: Path, path: Path) -> bool:
    """Whether the content of `path` lies in `folder`; a hub snapshot's lies in the blobs of the same model."""
    home, target = folder.resolve(), path.resolve()
    blobs = home.parent.parent / "blobs"
    return target.is_relative_to(home) or (home.parent.name == "snapshots" and target.is_relative_to(blobs))


def _settings(path: Path) -> dict[str, Any]:
    """What a configuration file says; nothing for other files, and for one that is no JSON object."""
    if not path.name.endswith("config.json"):
        return {}
    try:
        return read_json(path)
    except CheckpointError:
        return {}


def _without_code(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_code(value) if isinstance(value, dict) else value
        for key, value in settings.items()
        if key != CODE
    }
