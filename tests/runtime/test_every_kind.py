"""Every verb on every kind of loaded model: the values are those of the decoded weights."""

from __future__ import annotations

import copy
import shutil

import numpy as np
import pytest
import torch
from arithmetic import exact_arithmetic
from page_orders import write_order
from tiny_models import tiny_llama, tiny_text, tiny_tokenizer
from transformers import AutoModelForCausalLM

import bitstrata
from bitstrata.calibration import evaluation_windows, read_text
from bitstrata.checkpoint import CheckpointReader
from bitstrata.errors import UnsupportedBitsError, UsageError
from bitstrata.nn import bits_state
from bitstrata.planes import decode
from bitstrata.runtime import Conversation, Engine, Request

IDS = torch.tensor([[0, 5, 9, 13, 17, 21, 25]])
PROMPT = "there is a"
NEW = 6
WAIT = 60
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(autouse=True, scope="module")
def exact():
    """No activations in int8, so that what is computed is what the decoded weights say."""
    with exact_arithmetic():
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def folders(source, tmp_path_factory):
    """plain and head: checkpoints at 2, 3 and 4 bits, with a page order."""
    made = {}
    for name, options in (("plain", {}), ("head", {"head_bits": 3})):
        made[name] = tmp_path_factory.mktemp(name) / "out"
        bitstrata.quantize(source, made[name], method="rtn", bits="2-4", group_size=32, **options)
        write_order(made[name])
    return made


def mixed_plan(folder):
    return {name: 2 + index % 3 for index, name in enumerate(CheckpointReader(folder).spec.planned_layers)}


def on_disk(folder, room, places):
    return AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=room)


def saved_again(folder, room):
    bitstrata.load(folder).save_pretrained(room / "again")
    for file in folder.glob("tokenizer*"):
        shutil.copy(file, room / "again")
    return bitstrata.load(room / "again")


PLACES = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
KINDS = {
    "whole": lambda folders, room: bitstrata.load(folders["plain"]),
    "prefix": lambda folders, room: bitstrata.load(folders["plain"], max_bits=3),
    "plan": lambda folders, room: bitstrata.load(folders["plain"], plan=mixed_plan(folders["plain"])),
    "uniform plan": lambda folders, room: bitstrata.load(folders["plain"], plan=3),
    "budget": lambda folders, room: bitstrata.load(folders["plain"], budget="3.9bpw"),
    "head": lambda folders, room: bitstrata.load(folders["head"]),
    "head and plan": lambda folders, room: bitstrata.load(folders["head"], plan=mixed_plan(folders["head"])),
    "dispatched": lambda folders, room: on_disk(
        folders["plain"], room, {**PLACES, "model.layers.0": "cpu", "model.layers.1": "disk"}
    ),
    "all on disk": lambda folders, room: on_disk(folders["head"], room, {"": "disk"}),
    "saved again": lambda folders, room: saved_again(folders["plain"], room),
    "from_pretrained": lambda folders, room: AutoModelForCausalLM.from_pretrained(folders["head"]),
}


WITH_HEAD = {"head", "head and plan", "all on disk", "from_pretrained"}
DENSE = {}  # (folder, precision) -> the dense model


class Case:
    """A loaded model, and the dense models that it has to agree with."""

    def __init__(self, kind, folders, source, room):
        self.kind, self.room, self.source = kind, room, source
        self.folder = folders["head" if kind in WITH_HEAD else "plain"]
        self.model = KINDS[kind](folders, room)
        self.state = bits_state(self.model)

    @property
    def resident(self):
        return self.state.plan is not None

    @property
    def precisions(self):
        """What it can be asked for."""
        return [*self.state.supported, mixed_plan(self.folder)] if not self.resident else [dict(self.state.plan)]

    def dense(self, precision=None):
        """The source with the weights that `precision` decodes to, fp32."""
        precision = self.state.default if precision is None else precision
        key = self.folder, precision if isinstance(precision, int) else tuple(sorted(precision.items()))
        if key not in DENSE:
            DENSE[key] = self._decoded(precision)
        return DENSE[key]

    def _decoded(self, precision):
        reader = CheckpointReader(self.folder)
        model = AutoModelForCausalLM.from_pretrained(self.source, dtype=torch.float32)
        for name, layer in reader.spec.layers.items():
            bits = layer.bits[0] if layer.role else precision if isinstance(precision, int) else precision[name]
            weight = decode(reader.layer(name), bits, torch.float32)
            model.get_submodule(name).weight = torch.nn.Parameter(weight, requires_grad=False)
        return model

    def assert_logits(self, logits, precision=None):
        torch.testing.assert_close(logits, self.dense(precision)(IDS).logits, **TOLERANCE)


@pytest.fixture(params=KINDS)
def case(request, folders, source, tmp_path):
    with torch.no_grad():
        yield Case(request.param, folders, source, tmp_path)


def continued(model, ids, **options):
    mask = torch.ones_like(ids)
    found = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0, **options)
    return found[0, ids.shape[1] :].tolist()


def test_forward(case):
    case.assert_logits(case.model(IDS).logits)
    case.assert_logits(case.model.forward(IDS).logits)


def test_forward_at_bits(case):
    for precision in case.precisions:
        if case.kind == "prefix" and not isinstance(precision, int):
            precision = dict.fromkeys(precision, 2) | {next(iter(precision)): 3}
        case.assert_logits(case.model(IDS, bits=precision).logits, precision)
        case.assert_logits(case.model.forward(IDS, bits=precision).logits, precision)
    for wrong in (7, "nonsense", 2.0, True):
        with pytest.raises(UsageError):
            case.model(IDS, bits=wrong)
    case.assert_logits(case.model(IDS).logits)


def test_bits_of_each_row(case):
    asked = torch.tensor([3, 3] if case.kind == "uniform plan" else [2, 3])
    if case.resident and case.kind != "uniform plan":
        with pytest.raises(UsageError):
            case.model(IDS.repeat(2, 1), bits=asked)
        return
    logits = case.model(IDS.repeat(2, 1), bits=asked).logits
    for row, bits in zip(logits, asked.tolist(), strict=True):
        case.assert_logits(row[None], bits)


def test_use_bits(case):
    for precision in case.state.supported or [dict(case.state.plan)]:
        with bitstrata.use_bits(case.model, precision):
            case.assert_logits(case.model(IDS).logits, precision)
    case.assert_logits(case.model(IDS).logits)


def test_transformers_generate(case):
    assert continued(case.model, IDS) == continued(case.dense(), IDS)
    for bits in case.state.supported:
        assert continued(case.model, IDS, bits=bits) == continued(case.dense(bits), IDS)


def test_generate_and_conversation(case):
    tokenizer = tiny_tokenizer()
    for bits in (None, *case.state.supported):
        asked = None if bits is None else np.int64(bits)
        found = bitstrata.generate(case.model, PROMPT, bits=asked, max_new_tokens=NEW, tokenizer=tokenizer)
        ids = torch.tensor([bitstrata.runtime.generation.encode_prompt(tokenizer, PROMPT)])
        text = tokenizer.decode(continued(case.dense(bits), ids), skip_special_tokens=True)
        assert found.text == text
        talk = Conversation(case.model, tokenizer, bits=asked, max_new_tokens=NEW)
        assert talk.reply(PROMPT).text == text


def test_evaluate(case, tmp_path):
    text = tiny_text(tmp_path / "text.txt", documents=2, words=8)
    tokenizer = tiny_tokenizer()
    found = bitstrata.evaluate(case.model, text, seq_len=20, tokenizer=tokenizer)
    windows = list(evaluation_windows(tokenizer, read_text(text), 20))
    assert len(found.results) == max(1, len(case.state.supported))
    asked = case.state.supported or [None]
    for row, precision in zip(found.results, asked, strict=True):
        dense, losses = case.dense(precision), []
        for window in windows:
            log_q = dense(torch.tensor([window])).logits[0, :-1].log_softmax(-1)
            losses.append(-log_q.gather(1, torch.tensor(window[1:])[:, None]).flatten())
        assert row.nll == pytest.approx(float(torch.cat(losses).mean()), rel=1e-4)
        assert row.bits == (str(case.state.plan) if precision is None else precision)
    assert found.arithmetic == "exact"


def test_engine(case):
    with Engine(case.model) as engine:
        for bits in (None, *case.state.supported):
            asked = None if bits is None else np.int64(bits)
            handle = engine.submit(Request(IDS[0].tolist(), bits=asked, max_new_tokens=NEW, ignore_eos=True))
            assert handle.result(WAIT) == continued(case.dense(bits), IDS, eos_token_id=None)
    case.assert_logits(case.model(IDS).logits)


def test_resize(case):
    if not case.resident:
        with pytest.raises(UsageError, match="cannot be resized"):
            case.model.resize(3)
        return
    for size in (2, mixed_plan(case.folder), 4):
        case.model.resize(size)
        case.assert_logits(case.model(IDS).logits, size)


@pytest.mark.parametrize("case", [kind for kind in KINDS if kind not in ("dispatched", "all on disk")], indirect=True)
def test_state_dict(case):
    """Of a placed model accelerate holds the tensors, and gives them to nobody."""
    state = {name: tensor.clone() for name, tensor in case.model.state_dict().items()}
    case.model.load_state_dict(state)
    case.assert_logits(case.model(IDS).logits)
    for precision in case.precisions[:1]:
        case.assert_logits(case.model(IDS, bits=precision).logits, precision)


def test_deepcopy(case):
    twin = copy.deepcopy(case.model)
    case.assert_logits(twin(IDS).logits)
    for precision in case.precisions[:1]:
        with bitstrata.use_bits(twin, precision):
            case.assert_logits(twin(IDS).logits, precision)
            case.assert_logits(case.model(IDS).logits)


def test_save_and_inspect(case):
    again = case.room / "saved"
    if case.resident:
        with pytest.raises(UsageError, match="holds only the pages"):
            case.model.save_pretrained(again)
        return
    case.model.save_pretrained(again)
    assert bitstrata.inspect(again, verify=True).bits == case.state.supported
    loaded = bitstrata.load(again)
    for bits in case.state.supported:
        case.assert_logits(loaded(IDS, bits=bits).logits, bits)


def test_bits_that_are_not_there(case):
    with pytest.raises(UnsupportedBitsError):
        case.model(IDS, bits=8)
    with pytest.raises(UnsupportedBitsError):
        continued(case.model, IDS, bits=8)
    with pytest.raises(UnsupportedBitsError):
        bitstrata.generate(case.model, PROMPT, bits=8, tokenizer=tiny_tokenizer())
    with pytest.raises(UnsupportedBitsError), bitstrata.use_bits(case.model, 8):
        pass
