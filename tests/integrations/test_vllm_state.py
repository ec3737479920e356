"""What vLLM's own classes make of the plugin in one process: model runner V2, which no server on a CPU without Triton
runs, and drafts that share weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.vllm
FQCN = "bitstrata.integrations.vllm.requests:RequestBits"


@pytest.fixture(scope="module")
def config(checkpoint: Path, plan: Path):
    from vllm.engine.arg_utils import EngineArgs

    options = {"bitstrata": {"bits": 3, "plans": {"mixed": str(plan)}}}
    flags = {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 8, "load_format": "bitstrata"}
    return EngineArgs(model=str(checkpoint), hf_overrides=options, **flags).create_engine_config()


def batch(places: list[int], counts: list[int]):
    """vLLM's description of a step: the requests' places and their numbers of rows."""
    import torch
    from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers

    made = InputBatch.make_dummy(len(places), sum(counts), InputBuffers(8, 256, torch.device("cpu")))
    starts = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    return replace(made, idx_mapping=torch.tensor(places, dtype=torch.int32), query_start_loc=starts)


def test_every_row_has_the_bits_of_its_request(config):
    import torch
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState

    from bitstrata.integrations.vllm.state import bits_state

    state = bits_state(DefaultModelState)(config, torch.nn.Linear(1, 1), None, torch.device("cpu"))
    assert isinstance(state, DefaultModelState)
    for place, extra in ((5, {"bits": 2}), (0, None), (7, {"bits": 4}), (3, {"plan": "mixed"})):
        params = SimpleNamespace(extra_args=extra)
        state.add_request(place, SimpleNamespace(sampling_params=params, mm_features=[], prefill_token_ids=[1]))
    rows, plan = config.quant_config.rows, config.quant_config.offered.plans["mixed"]
    layers = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
    addresses = [rows.of_layer(layer).of(1, None, None).data_ptr() for layer in layers]
    assert state.prepare_inputs(batch([7, 5, 3, 0], [1, 3, 1, 1]), None) == {}
    for layer in layers:
        seen = rows.of_layer(layer).of(8, None, None).tolist()
        assert seen == [4, 2, 2, 2, plan[layer], 3, 3, 3]  # and two that fill up the step
    state.add_request(5, SimpleNamespace(sampling_params=SimpleNamespace(extra_args={"bits": 4}), mm_features=[]))
    state.prepare_inputs(batch([5], [2]), None)
    assert [rows.of_layer(layer).of(4, None, None).tolist() for layer in layers] == [[4, 4, 3, 3]] * 3
    # what a recorded graph reads
    assert [rows.of_layer(layer).of(1, None, None).data_ptr() for layer in layers] == addresses


def test_requests_are_checked_by_the_same_class(config):
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import SamplingParams
    from vllm.v1.sample.logits_processor import validate_logits_processors_parameters
    from vllm.v1.worker.gpu.sample.logits_processor import build_custom_logits_processors_params_validator

    second = build_custom_logits_processors_params_validator([FQCN])
    for check in (second, lambda params: validate_logits_processors_parameters([FQCN], params)):
        check(SamplingParams(extra_args={"bits": 2}))
        check(SamplingParams())
        check(SamplingParams(extra_args={"plan": "mixed"}))
        with pytest.raises(VLLMValidationError, match="supported bits: 2, 3, 4; plans: mixed"):
            check(SamplingParams(extra_args={"bits": 5}))


def test_a_server_whose_bits_would_not_reach_the_layers_does_not_start(config, monkeypatch):
    from bitstrata.errors import UsageError
    from bitstrata.integrations.vllm.requests import SCHEDULER, RequestBits

    def start(*, load_format: str = "auto", scheduler: str | None = SCHEDULER, second: bool = True):
        changed = SimpleNamespace(
            quant_config=config.quant_config,
            use_v2_model_runner=second,
            load_config=SimpleNamespace(load_format=load_format),
            compilation_config=config.compilation_config,
            scheduler_config=SimpleNamespace(scheduler_cls=scheduler),
            cache_config=SimpleNamespace(enable_prefix_caching=True),
        )
        return RequestBits(changed, object())

    start(load_format="bitstrata")
    start(second=False)
    with pytest.raises(UsageError, match="add --load-format bitstrata"):
        start()
    with pytest.raises(UsageError, match="other bits; add --scheduler-cls"):
        start(load_format="bitstrata", scheduler=None)


def tree(config, *, loaded: bool, own: bool = False):
    """A model of one linear in planes, a norm and a head that is tied to it; `own`: with a parameter beside them."""
    import torch
    from torch import nn

    from bitstrata.integrations.vllm.linear import PlaneLinearMethod
    from bitstrata.integrations.vllm.product import Product

    name = "model.layers.0.mlp.down_proj"
    rows = config.rows.of_layer(name)
    model = nn.Module()
    model.add_module("layer", nn.Module())
    model.layer.add_module("down", nn.Module())
    model.layer.add_module("norm", nn.LayerNorm(4))
    model.add_module("head", model.layer.norm)
    model.layer.down.quant_method = PlaneLinearMethod(config._stored([name]), [rows])
    if loaded:
        model.layer.down.product = Product([(object(), rows)])
    if own:
        model.register_parameter("scale", nn.Parameter(torch.ones(1)))
    return model


def test_a_draft_has_the_weights_of_the_model_and_bits_of_its_own(config):
    import torch

    from bitstrata.errors import UsageError
    from bitstrata.integrations.vllm.speculation import remember, share, target_of

    target, draft = (tree(config.quant_config, loaded=loaded) for loaded in (True, False))
    remember(config.model_config, target, config.quant_config)
    assert target_of(config.model_config) is target
    share(draft, target, torch.float32)
    ((weight, rows),) = draft.layer.down.product.parts
    ((own, theirs),) = target.layer.down.product.parts
    assert weight is own
    assert (rows.of(5, object(), [0, 2, 5]), theirs.whole is config.quant_config.rows) == (2, True)
    assert draft.layer.norm is draft.head is target.layer.norm
    with pytest.raises(UsageError, match="scale of the model cannot be shared"):
        share(tree(config.quant_config, loaded=False, own=True), target, torch.float32)
    with pytest.raises(UsageError, match="is not the model that is served"):
        target_of(SimpleNamespace(model="another"))


def test_drafts_must_be_at_fewer_bits_than_requests(config):
    from bitstrata.errors import UsageError
    from bitstrata.integrations.vllm.options import ServeOptions
    from bitstrata.integrations.vllm.speculation import draft_bits

    def bits(**options):
        parsed = ServeOptions(**options)
        return draft_bits(SimpleNamespace(options=parsed, offered=parsed.offer(config.quant_config.spec)))

    assert [bits(), bits(draft_bits=3), bits(bits=3)] == [2, 3, 2]
    for wrong in ({"draft_bits": 4}, {"draft_bits": 1}, {"bits": 2}):
        with pytest.raises(UsageError, match="cannot be made"):
            bits(**wrong)
