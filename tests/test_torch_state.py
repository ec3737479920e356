"""Every verb gives what it gives in torch's ordinary state, whatever state its caller is in, and leaves that state."""

from __future__ import annotations

import contextlib
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_states
from job_helpers import ANYBCQ, ANYPRECISION, BCQ, RTN, digests
from job_helpers import run as quantize
from tiny_models import tiny_llama, tiny_text

import bitstrata
from bitstrata.allocation import SENSITIVITY_FILE
from bitstrata.demonstration import run as demo_module
from bitstrata.models import load_tokenizer
from bitstrata.runtime import Conversation, Engine, Request
from bitstrata.torch_state import ordinary_torch


@contextlib.contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def inexact_products() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def all_at_once() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for name in ("inference_mode", "autocast", "float64", "device meta", "deterministic", "inexact products"):
            stack.enter_context(STATES[name]())
        yield


STATES: dict[str, Callable[[], Any]] = {
    **torch_states.STATES,
    "default device meta": lambda: default_device("meta"),
    "inexact products": inexact_products,
    "anomalies": lambda: torch.autograd.set_detect_anomaly(True),
    "all at once": all_at_once,
}


def observed() -> tuple[Any, ...]:
    """What a caller can see of torch's state."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
        torch.get_autocast_dtype("cpu"),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.empty(0).device,
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        # "ieee" is the name for it once it was set, "none" before
        torch.backends.mkldnn.matmul.fp32_precision.replace("ieee", "none"),  # type: ignore[attr-defined]
        torch.backends.cuda.matmul.fp32_precision.replace("ieee", "none"),
    )


def without_what_is_left_alone(state: tuple[Any, ...]) -> tuple[Any, ...]:
    """Without the deterministic mode, and without the former name of the precision of products."""
    return state[:8] + state[10:]


ORDINARY = observed()


@pytest.fixture(params=STATES)
def state(request: pytest.FixtureRequest) -> Callable[[], Any]:
    return STATES[request.param]


def test_the_ordinary_state_is_the_one_torch_starts_in_and_the_callers_comes_back(state: Callable[[], Any]) -> None:
    with state():
        before = observed()
        with ordinary_torch():
            inside = observed()
        assert observed() == before
        with pytest.raises(ZeroDivisionError), ordinary_torch():
            raise ZeroDivisionError
        assert observed() == before
    assert without_what_is_left_alone(inside) == without_what_is_left_alone(ORDINARY)
    assert observed() == ORDINARY


JOBS: dict[str, dict[str, Any]] = {
    "rtn": {**RTN, "head_bits": 6},
    "bcq": BCQ,
    "anybcq": ANYBCQ,
    "anyprecision": ANYPRECISION,
    "gptq": {"method": "gptq", "options": {}, "bits": 3},
    "bpdq": {"method": "bpdq", "options": {"iterations": 2}, "bits": 3},
    "nested": {"method": "nested", "options": {"iterations": 2}},
    "nested best": {"method": "nested", "options": {"iterations": 2, "tune_steps": 3}, "preset": "best"},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model"), num_hidden_layers=1)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_text(tmp_path_factory.mktemp("text") / "text.txt", documents=2)


@pytest.mark.parametrize("job", JOBS)
def test_quantize_writes_the_same_bytes(job: str, model: Path, text: Path, tmp_path: Path) -> None:
    quantize(model, tmp_path / "ordinary", text, num_samples=3, **JOBS[job])
    expected = digests(tmp_path / "ordinary")
    # every state meets a job and every job some states; all of them meet the quickest job
    names = list(STATES) if job == "rtn" else list(STATES)[list(JOBS).index(job) % 4 :: 4]
    for name, state in ((name, STATES[name]) for name in names):
        with state():
            before = observed()
            quantize(model, tmp_path / name, text, num_samples=3, **JOBS[job])
            assert observed() == before, name
        assert digests(tmp_path / name) == expected, name


@pytest.fixture(scope="module")
def quantized(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("quantized") / "out"
    quantize(model, output, text, **RTN, head_bits=8)
    bitstrata.plan(output, "5.5bpw", text=text, windows=2, seq_len=16, pages=True)
    return output


def tensors_of(model: torch.nn.Module) -> dict[str, Any]:
    """Every parameter and buffer, as values; none is one that only inference mode may touch."""
    found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert not any(tensor.is_inference() for tensor in found.values())
    return {name: (tensor.dtype, tensor.device, tensor.tolist()) for name, tensor in found.items()}


def loads(folder: Path, text: Path) -> Any:
    return tensors_of(bitstrata.load(folder, device="cpu"))


def resizes(folder: Path, text: Path) -> Any:
    model = bitstrata.load(folder, budget="5bpw", device="cpu")
    grown = bitstrata.resize(model, "6bpw").to_json()
    grown.pop("seconds", None)
    return grown, tensors_of(model)


def evaluates(folder: Path, text: Path) -> Any:
    return bitstrata.evaluate(folder, text, reference=folder, seq_len=16, max_tokens=40, device="cpu").to_json()


def evaluates_a_loaded_model(folder: Path, text: Path) -> Any:
    return bitstrata.evaluate(bitstrata.load(folder, device="cpu"), text, seq_len=16, max_tokens=40).to_json()


def generates(folder: Path, text: Path) -> Any:
    made = [
        bitstrata.generate(folder, "the ", bits, 12, device="cpu", **settings)
        for bits in (2, 4)
        for settings in ({}, {"temperature": 0.9, "seed": 3})
    ]
    return [(item.text, item.tokens, item.bits) for item in made]


def speculates(folder: Path, text: Path) -> Any:
    made = bitstrata.generate(folder, "the ", 4, 20, draft_bits=2, device="cpu")
    return made.text, made.tokens, made.acceptance


def converses(folder: Path, text: Path) -> Any:
    model = bitstrata.load(folder, device="cpu")
    conversation = Conversation(model, load_tokenizer(folder), bits=3, max_new_tokens=8)
    return [conversation.reply(turn).text for turn in ("one ", "two ")]


def serves(folder: Path, text: Path) -> Any:
    prompts = [[0, 5, 9, 12], [0, 7], [0, *range(3, 33)]]
    with Engine(bitstrata.load(folder, device="cpu"), max_requests=3, cache_tokens=512) as engine:
        handles = [
            engine.submit(Request(prompt, bits=bits, max_new_tokens=9, logprobs=2, ignore_eos=True))
            for prompt, bits in zip(prompts, (2, 3, 4), strict=True)
        ]
        return [list(handle.events(60)) for handle in handles]


def inspects(folder: Path, text: Path) -> Any:
    return bitstrata.inspect(folder).to_json()


def plans(folder: Path, text: Path) -> Any:
    output = folder.parent / "plan.json"
    (folder / SENSITIVITY_FILE).unlink(missing_ok=True)
    report = bitstrata.plan(
        folder, "5.2bpw", text=text, output=output, windows=2, seq_len=16, device="cpu", pages=True,
    )  # fmt: skip
    return report.to_json(), output.read_bytes(), (folder / SENSITIVITY_FILE).read_bytes()


def plans_by_hessians(folder: Path, text: Path) -> Any:
    other = folder.parent / "hessian.json"
    other.unlink(missing_ok=True)
    report = bitstrata.plan(
        folder, "5.2bpw", text=text, sensitivity=other, measure="hessian", windows=2, seq_len=16, device="cpu",
    )  # fmt: skip
    return report.to_json(), other.read_bytes()


def benches(folder: Path, text: Path) -> Any:
    """Kernels are checked against float64 before they are timed; the errors found there are results too."""
    found = bitstrata.bench(shapes="64x96", bits="2,3", rows="1,17", rounds=1, regimes=("cache",), device="cpu")
    return [(row.name, row.rows, row.bytes, row.error) for row in found.linear]


VERBS = (
    loads, resizes, evaluates, evaluates_a_loaded_model, generates, speculates, converses, serves, inspects, plans,
    plans_by_hessians, benches,
)  # fmt: skip


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.__name__)
def test_a_verb_gives_the_same(
    verb: Callable[[Path, Path], Any], quantized: Path, text: Path, tmp_path: Path, seed: int
) -> None:
    folder = Path(shutil.copytree(quantized, tmp_path / "model" / "out"))
    expected = verb(folder, text)
    chosen = STATES
    if verb in (plans, plans_by_hessians, benches):  # the slow ones: each time others of the states
        chosen = {name: STATES[name] for name in [*random.Random(seed).sample(sorted(STATES), 3), "all at once"]}
    for name, state in chosen.items():
        with state():
            before = observed()
            assert verb(folder, text) == expected, name
            assert observed() == before, name


def test_the_demo_begins_in_the_ordinary_state(monkeypatch: pytest.MonkeyPatch, state: Callable[[], Any]) -> None:
    """All of the rest of it is verbs."""
    seen: list[tuple[Any, ...]] = []

    def quantize(*_: Any, **__: Any) -> None:
        seen.append(observed())
        raise InterruptedError

    monkeypatch.setattr(demo_module, "quantize", quantize)
    with state(), pytest.raises(InterruptedError):
        bitstrata.demo()
    assert without_what_is_left_alone(seen[0]) == without_what_is_left_alone(ORDINARY)


def test_verbs_that_overlap_in_threads_share_what_belongs_to_the_process():
    """The first to end must not put back what the other still needs."""
    inside, leave, seen = threading.Event(), threading.Event(), []

    @ordinary_torch()
    def long_verb():
        inside.set()
        assert leave.wait(60)
        seen.append(torch.get_default_dtype())

    with torch_states.default_dtype(torch.bfloat16):
        other = threading.Thread(target=long_verb)
        with ordinary_torch():
            other.start()
            assert inside.wait(60)
        leave.set()
        other.join(60)
        assert seen == [torch.float32]
        assert torch.get_default_dtype() == torch.bfloat16
