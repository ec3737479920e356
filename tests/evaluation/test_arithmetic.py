"""What is measured is exact, or as decoding computes it, and the result says which."""

from __future__ import annotations

import itertools
import json
import threading
from pathlib import Path

import pytest
import torch
from test_evaluate import dense_model, direct
from tiny_models import tiny_llama, tiny_tokenizer
from transformers import PreTrainedModel

import bitstrata
from bitstrata.calibration import evaluation_windows, read_text
from bitstrata.errors import KernelError, UsageError
from bitstrata.evaluation import evaluate
from bitstrata.kernels import registry, select
from bitstrata.kernels.cpu import missing
from bitstrata.nn import bits_state, multiplied_layers

native = pytest.mark.skipif(bool(missing), reason="the native kernels are not built")


@pytest.fixture(autouse=True)
def not_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(registry.ENVIRONMENT, raising=False)


@pytest.fixture(params=["no head", "head", "tied head"])
def checkpoint(request: pytest.FixtureRequest, model: Path, quantized: Path, tmp_path: Path) -> Path:
    if request.param == "no head":
        return quantized
    source = model
    if request.param == "tied head":
        source = tiny_llama(tmp_path / "tied", tie_word_embeddings=True)
    options = {"method": "rtn", "bits": "2-4", "group_size": 32, "head_bits": 4}
    bitstrata.quantize(source, tmp_path / "out", **options)
    return tmp_path / "out"


def forced(monkeypatch: pytest.MonkeyPatch, kernel: str, folder: Path, text: Path, **settings: object):
    with monkeypatch.context() as patch:
        patch.setenv(registry.ENVIRONMENT, kernel)
        return evaluate(folder, text, device="cpu", **settings)  # type: ignore[arg-type]


@native
@pytest.mark.parametrize("seq_len", [9, 64])
def test_int8_is_what_decoding_steps_compute(
    checkpoint: Path, text: Path, seq_len: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of a sequence fed token by token, as `generate` feeds it, is that of its windows measured in int8."""
    found = evaluate(checkpoint, text, seq_len=seq_len, max_tokens=60, arithmetic="int8", device="cpu")
    loaded = bitstrata.load(checkpoint, dtype=torch.float32)
    windows = evaluation_windows(tiny_tokenizer(), read_text(text), seq_len, 60)
    losses: dict[int, list[float]] = {2: [], 3: [], 4: []}
    with torch.no_grad():
        for window in windows:
            for bits, into in losses.items():
                cache = None
                for token, following in itertools.pairwise(window):
                    out = loaded(torch.tensor([[token]]), bits=bits, past_key_values=cache, use_cache=True)
                    cache = out.past_key_values
                    into.append(-float(out.logits[0, -1].log_softmax(-1)[following]))
    for row in found.results:
        mine = losses[int(row.bits)]
        assert row.nll == pytest.approx(sum(mine) / len(mine), rel=2e-3)
    kernel = f"{select('cpu', torch.float32).name}-int8"
    assert (found.arithmetic, found.kernel) == ("int8", kernel)
    again = forced(monkeypatch, kernel, checkpoint, text, seq_len=seq_len, max_tokens=60)
    assert again.results == found.results
    exact = evaluate(checkpoint, text, seq_len=seq_len, max_tokens=60, arithmetic="exact", device="cpu")
    assert all(one.nll != other.nll for one, other in zip(found.results, exact.results, strict=True))


@pytest.mark.parametrize("seq_len", [9, 64])
def test_exact_is_what_the_decoded_weights_compute(model: Path, quantized: Path, text: Path, seq_len: int) -> None:
    """Also in windows of few tokens, which a CPU's kernels would make int8."""
    found = evaluate(quantized, text, seq_len=seq_len, max_tokens=15, arithmetic="exact", device="cpu")
    windows = list(evaluation_windows(tiny_tokenizer(), read_text(text), seq_len, 15))
    for row in found.results:
        log_q, targets = direct(dense_model(model, quantized, int(row.bits)), windows)
        nll = float(-log_q[torch.arange(len(targets)), targets].mean())
        assert row.nll == pytest.approx(nll, rel=1e-6)
    assert found.arithmetic == "exact"


@native
def test_by_default_it_is_what_runs_and_the_result_says_so(quantized: Path, text: Path) -> None:
    plain = select("cpu", torch.float32).name
    many = evaluate(quantized, text, device="cpu")
    assert (many.arithmetic, many.kernel) == ("exact", plain)
    few = evaluate(quantized, text, seq_len=9, max_tokens=5, device="cpu")
    assert (few.arithmetic, few.kernel) == ("int8", plain)
    for found, arithmetic in ((many, "exact"), (few, "int8")):
        assert found.to_json()["arithmetic"] == arithmetic
        assert f"in {arithmetic} arithmetic (kernel {plain})" in str(found)
        assert json.loads(json.dumps(found.to_json()))["kernel"] == plain


def test_a_forced_kernel_is_named_and_never_replaced(
    quantized: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = forced(monkeypatch, "reference", quantized, text, max_tokens=30, arithmetic="exact")
    assert (found.arithmetic, found.kernel) == ("exact", "reference")
    with pytest.raises(KernelError, match="no kernel computes in int8 arithmetic here: reference runs, which is exact"):
        forced(monkeypatch, "reference", quantized, text, max_tokens=30, arithmetic="int8")


def test_where_nothing_is_int8_that_is_said(quantized: Path, text: Path) -> None:
    loaded = bitstrata.load(quantized, dtype=torch.float64, device="cpu")
    assert evaluate(loaded, text, max_tokens=30, arithmetic="exact").kernel == "reference"
    with pytest.raises(KernelError, match="no kernel computes in int8 arithmetic here: reference runs, which is exact"):
        evaluate(loaded, text, max_tokens=30, arithmetic="int8")


def test_an_arithmetic_that_is_not_known_is_refused(quantized: Path, text: Path) -> None:
    with pytest.raises(UsageError, match="'int4' is not known") as caught:
        evaluate(quantized, text, arithmetic="int4", device="cpu")
    assert caught.value.hint == "one of exact, int8"


@native
def test_it_holds_for_this_model_and_this_evaluation_only(quantized: Path, text: Path) -> None:
    """No other model sees it, the model itself no longer afterwards, and another thread cannot get into it."""
    model, other = (bitstrata.load(quantized, device="cpu") for _ in range(2))
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        expected = other(ids, bits=2).logits
        seen: list[torch.Tensor] = []
        refused: list[Exception] = []

        def look(*_: object) -> None:
            if not seen:
                seen.append(other(ids, bits=2).logits)
                thread = threading.Thread(target=intrude, args=(model, ids, refused))
                thread.start()
                thread.join()

        hook = multiplied_layers(model)[3].register_forward_pre_hook(look)
        evaluate(model, text, bits=2, max_tokens=30, arithmetic="exact")
        hook.remove()
        assert torch.equal(seen[0], expected)
        assert "in exact arithmetic" in str(refused[0])
        assert bits_state(model).arithmetic is None
        assert torch.equal(model(ids, bits=2).logits, expected)
        with pytest.raises(ZeroDivisionError), bits_state(model).using(2, "exact"):
            raise ZeroDivisionError
        assert torch.equal(model(ids, bits=2).logits, expected)


def intrude(model: PreTrainedModel, ids: torch.Tensor, refused: list[Exception]) -> None:
    try:
        with torch.no_grad():
            model(ids, bits=2)
    except UsageError as error:
        refused.append(error)
