"""A checkpoint as a classifier or as a plain scales: the quantized layers are the same, a head of its own is kept."""

from __future__ import annotations

import pickle

import pytest
import torch
from tiny_models import tiny_tokenizer
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, pipeline
from transformers import AutoModelForTokenClassification as TokenClassification

import bitstrata
from bitstrata.checkpoint import CheckpointReader
from bitstrata.errors import CheckpointError, UnsupportedBitsError
from bitstrata.nn import bits_state
from bitstrata.planes import decode

CLASSES = {"sequence": AutoModelForSequenceClassification, "token": TokenClassification}
BITS = (2, 8)


@pytest.fixture(scope="module", params=["llama", "llama-tied", "gpt2"])
def name(request):
    return request.param


@pytest.fixture(scope="module", params=[None, 3], ids=["dense head", "head in planes"])
def checkpoint(request, name, quantized, tmp_path_factory):
    """The source, and the folder that was made of it."""
    original, source, folder = quantized(name)
    if request.param is not None:
        folder = tmp_path_factory.mktemp(name) / "out"
        settings = {"bits": "2,8", "method": "rtn", "group_size": 32}
        bitstrata.quantize(source, folder, head_bits=request.param, **settings)
    return original, source, folder


@pytest.fixture
def ids(seed):
    return torch.randint(3, 96, (2, 20), generator=torch.Generator().manual_seed(seed))


def hidden_states(source, folder, ids, bits):
    """What the scales makes of `ids` with the weights as decoded at `bits`, fp32."""
    reader = CheckpointReader(folder)
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for layer, spec in reader.spec.layers.items():
        weight = decode(reader.layer(layer), spec.bits[0] if spec.role else bits, torch.float32)
        module = dense.get_submodule(layer)
        transposed = type(module).__name__ == "Conv1D"
        module.weight = torch.nn.Parameter(weight.T if transposed else weight, requires_grad=False)
    return dense(ids, output_hidden_states=True).hidden_states[-1]


@torch.no_grad()
def test_a_plain_decoder(checkpoint, ids, tmp_path):
    _, source, folder = checkpoint
    model = AutoModel.from_pretrained(folder)
    model.save_pretrained(tmp_path / "again")
    for loaded in (model, AutoModel.from_pretrained(tmp_path / "again"), pickle.loads(pickle.dumps(model))):
        for bits in BITS:
            expected = hidden_states(source, folder, ids, bits)
            torch.testing.assert_close(loaded(ids, bits=bits).last_hidden_state, expected, rtol=1e-4, atol=1e-4)
        plan = {layer: BITS[index % 2] for index, layer in enumerate(bits_state(model).layers)}
        expected = model(ids, bits=plan).last_hidden_state
        assert torch.equal(loaded(ids, bits=plan_of(loaded, plan)).last_hidden_state, expected)
        with pytest.raises(UnsupportedBitsError):
            loaded(ids, bits=7)


@torch.no_grad()
def test_pipelines_load_a_checkpoint_by_its_folder(checkpoint):
    _, _, folder = checkpoint
    features = pipeline("feature-extraction", model=str(folder), tokenizer=tiny_tokenizer())
    ids = torch.tensor(features.tokenizer("a b c").input_ids)[None]
    expected = AutoModel.from_pretrained(folder)(ids, bits=max(BITS)).last_hidden_state
    assert torch.equal(torch.tensor(features("a b c")), expected)


def plan_of(model, plan):
    """`plan` under the names of `model`: scales saved alone has no prefix."""
    own = bits_state(model).layers
    prefix = f"{model.base_model_prefix}."
    return {layer if layer in own else layer.removeprefix(prefix): bits for layer, bits in plan.items()}


@torch.no_grad()
@pytest.mark.parametrize("kind", CLASSES)
def test_a_classifier_keeps_its_head(kind, checkpoint, ids, tmp_path, seed):
    _, source, folder = checkpoint
    torch.manual_seed(seed)
    model = CLASSES[kind].from_pretrained(folder, num_labels=5).eval()
    head = model.score if hasattr(model, "score") else model.classifier
    head.weight.normal_()
    model.save_pretrained(tmp_path / "again")
    again = CLASSES[kind].from_pretrained(tmp_path / "again").eval()
    bias = 0 if head.bias is None else head.bias
    for bits in BITS:
        tokens = hidden_states(source, folder, ids, bits) @ head.weight.T + bias
        expected = tokens[:, -1] if kind == "sequence" else tokens
        for loaded in (model, again):
            torch.testing.assert_close(loaded(ids, bits=bits).logits, expected, rtol=1e-4, atol=1e-3)
            with bitstrata.use_bits(loaded, bits):
                assert torch.equal(loaded(ids).logits, loaded(ids, bits=bits).logits)
    assert not hasattr(model, "generate")
    assert not [layer for layer in CheckpointReader(tmp_path / "again").spec.layers.values() if layer.role == "head"]


def test_a_layer_that_is_missing_is_still_named(checkpoint):
    _, _, folder = checkpoint
    config = AutoConfig.from_pretrained(folder)
    config.num_hidden_layers = 1
    with pytest.raises(CheckpointError, match=r"the checkpoint quantizes .*(layers|h)\.1\..*, which \w+Model lacks"):
        AutoModel.from_pretrained(folder, config=config)
