"""Dense weights in one model, measured on the same windows of several texts.

The model, the arithmetic (fp32) and the windows are the same for every entry, so what differs is the weights. Of the
original only the last hidden states are kept, in a file for the next entries too: its output head makes the same logits
of them again.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitstrata.calibration import documents_of, evaluation_windows, read_mix
from bitstrata.errors import CheckError
from bitstrata.metrics import Tally
from bitstrata.models import load_tokenizer, text_prefix

from .made import ORIGINAL_BYTES, Job, Made, linears_of


@dataclass(frozen=True)
class Text:
    """A text to measure on: its name in the report, what `bitstrata eval --text` takes, how many tokens to predict."""

    name: str
    source: str
    tokens: int


@dataclass(frozen=True)
class Subject:
    """windows: token ids of each window, of which all but the first `given` are predicted.

    hidden: the original's last hidden states [s - 1, hidden] of each window. digest: of the token ids.
    """

    windows: list[Tensor]
    given: int
    hidden: list[Tensor]
    digest: str


class Judge:
    """The original model, into which weights are put, and what it says of each text.

    kept: a folder for the original's hidden states.
    """

    def __init__(self, job: Job, texts: list[Text], seq_len: int, kept: Path) -> None:
        self.model, self._files = job.loaded(), kept
        self.names = {f"{name}.weight" for name in linears_of(self.model)}
        self._parameters = dict(self.model.named_parameters(remove_duplicate=False))
        self._kept: dict[str, Tensor] = {}
        head = self.model.get_output_embeddings().weight
        self._head = head.detach().clone()
        self.head_bytes = ORIGINAL_BYTES * head.numel()
        self.weights = sum(self._parameters[name].numel() for name in self.names)
        tokenizer = load_tokenizer(job.model)
        given = max(1, len(text_prefix(tokenizer)))
        self.subjects = {}
        for text in texts:
            documents = documents_of(read_mix(text.source, part="heldout"), tokenizer)
            cut = list(evaluation_windows(tokenizer, documents, seq_len, text.tokens))
            windows = [torch.tensor(window) for window in cut]
            lengths = ",".join(str(len(ids)) for ids in windows)
            digest = hashlib.sha256(lengths.encode() + torch.cat(windows).numpy().tobytes()).hexdigest()
            self.subjects[text.name] = Subject(windows, given, self._original(windows, digest), digest)

    def measure(self, made: Made, *, with_head: bool) -> dict[str, dict[str, object]]:
        """By text: nll, its reference, kld, top1_agreement and how kld is spread (bitstrata.metrics.Spread).

        Raises CheckError if `made` lacks a linear of the blocks or names anything else.
        """
        if set(made.weights) != self.names:
            raise CheckError(f"these weights are not those of the blocks: {sorted(set(made.weights) ^ self.names)[:4]}")
        self._put(made.weights | (made.head if with_head else {}))
        return {name: self._on(subject) for name, subject in self.subjects.items()}

    def _put(self, weights: dict[str, Tensor]) -> None:
        """Give the model these weights, and its own where an earlier entry had put others."""
        with torch.no_grad():
            for name in self._kept.keys() - weights.keys():
                self._parameters[name].copy_(self._kept[name])
            for name, value in weights.items():
                parameter = self._parameters[name]
                if name not in self._kept:
                    self._kept[name] = parameter.detach().clone()
                if parameter.shape != value.shape:
                    raise CheckError(f"{name} is {tuple(value.shape)}, the model's is {tuple(parameter.shape)}")
                parameter.copy_(value)

    def _original(self, windows: list[Tensor], digest: str) -> list[Tensor]:
        """The original's hidden states of these windows, from a file if it was this model and this torch's."""
        seen = hashlib.sha256(f"{digest} {torch.__version__} {torch.backends.cpu.get_cpu_capability()}".encode())
        for name, value in sorted(self.model.state_dict().items()):
            seen.update(name.encode() + value.numpy().tobytes())
        file = self._files / f"original-{seen.hexdigest()[:16]}.safetensors"
        if not file.exists():
            states = {str(number): self._hidden(ids).contiguous() for number, ids in enumerate(windows)}
            self._files.mkdir(parents=True, exist_ok=True)
            save_file(states, file.with_suffix(".part"))
            file.with_suffix(".part").rename(file)
        found = load_file(file)
        return [found[str(number)] for number in range(len(windows))]

    def _hidden(self, ids: Tensor) -> Tensor:
        """The last hidden states [s - 1, hidden] from which tokens 1.. of `ids` are predicted."""
        with torch.no_grad():
            states: Tensor = self.model.base_model(ids[None], use_cache=False).last_hidden_state[0, :-1]
        return states

    def _on(self, subject: Subject) -> dict[str, object]:
        tally, base = Tally(), Tally()
        now = self.model.get_output_embeddings().weight
        with torch.no_grad():
            for ids, kept in zip(subject.windows, subject.hidden, strict=True):
                first, targets = subject.given - 1, ids[subject.given :]
                expected = kept[first:] @ self._head.T
                base.add(expected, targets)
                tally.add(self._hidden(ids)[first:] @ now.T, targets, expected)
        found, original = tally.result(), base.result()
        told = asdict(found)
        spread = told.pop("spread")
        return {**told, **spread, "reference_nll": original.nll}
