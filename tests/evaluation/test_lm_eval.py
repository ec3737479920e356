"""Tasks of lm-evaluation-harness at each bits, against the harness's own runs of the same weights."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from local_tasks import write_tasks
from test_evaluate import dense_model
from tiny_models import tiny_tokenizer
from typer.testing import CliRunner

import bitstrata
from bitstrata.cli.main import app
from bitstrata.errors import InputError, UsageError
from bitstrata.evaluation import evaluate

pytestmark = pytest.mark.lm_eval
NUMBERS = {
    "made_capitals": {"acc,none", "acc_norm,none"},
    "made_lists": {"exact_match,none"},
    "made_lines": {"byte_perplexity,none", "bits_per_byte,none"},
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def harness(tasks: Path, model: Any, **arguments: Any) -> dict[str, dict[str, Any]]:
    """What lm_eval.simple_evaluate says by itself."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=tasks, include_defaults=False)
    results: dict[str, dict[str, Any]] = simple_evaluate(
        model=model, tasks=list(NUMBERS), task_manager=manager, log_samples=False, **arguments
    )["results"]
    return results


def check_equal(found: Any, expected: Any) -> None:
    assert found.keys() == expected.keys() == NUMBERS.keys()
    for task, names in NUMBERS.items():
        assert names <= found[task].keys()
        for name in names:
            assert found[task][name] == pytest.approx(expected[task][name], rel=1e-4), (task, name)


def test_scores_are_those_of_the_harness_itself(
    model: Path, quantized: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the original's folder, and of dense models with the decoded weights."""
    from lm_eval.models.huggingface import HFLM

    monkeypatch.setenv("BITSTRATA_KERNEL", "reference")  # others make activations of few rows int8
    found = evaluate(quantized, tasks=str(tasks), reference=model, bits=[2, 4], batch_size=3, device="cpu")
    arguments = {"pretrained": str(model), "dtype": "float32"}
    assert found.reference is not None
    check_equal(found.reference["tasks"], harness(tasks, "hf", model_args=arguments, device="cpu"))
    for row in found.results:
        dense = dense_model(model, quantized, int(row.bits)).float()
        check_equal(row.tasks, harness(tasks, HFLM(pretrained=dense, tokenizer=tiny_tokenizer())))
    losses = [row.tasks["made_lines"]["bits_per_byte,none"] for row in found.results if row.tasks]
    assert len({*losses, found.reference["tasks"]["made_lines"]["bits_per_byte,none"]}) == 3, "each precision differs"
    assert (found.text, found.tokens, found.seq_len, found.results[0].kld) == (None, 0, None, None)
    assert found.arithmetic == "exact"
    assert found.tasks is not None
    assert found.tasks["made_capitals"] == {"samples": 6, "num_fewshot": 0, "version": 1.0}


def test_a_loaded_model_and_the_callers_random_numbers_stay_as_they_were(quantized: Path, tasks: Path) -> None:
    loaded = bitstrata.load(quantized, bits=3, device="cpu")
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected = (random.random(), np.random.random(), float(torch.rand(1)))
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    found = evaluate(loaded, bits=[2], tasks=[str(tasks / "made_capitals.yaml")], limit=2, num_fewshot=0)
    assert (random.random(), np.random.random(), float(torch.rand(1))) == expected
    assert bitstrata.nn.bits_state(loaded).value == 3
    assert found.tasks == {"made_capitals": {"samples": 2, "num_fewshot": 0, "version": 1.0}}


def test_a_text_and_tasks_are_measured_in_one_command(model: Path, quantized: Path, text: Path, tasks: Path) -> None:
    command = ["eval", quantized, "--text", text, "--max-tokens", "30", "--reference", model, "--bits", "2,3"]
    command += ["--tasks", f"{tasks / 'made_lines.yaml'},{tasks / 'made_capitals.yaml'}", "--limit", "3"]
    outcome = CliRunner().invoke(app, [*map(str, command), "--json"])
    assert outcome.exit_code == 0, outcome.output
    found = json.loads(outcome.stdout)
    assert [row["bits"] for row in found["results"]] == [2, 3]
    for row in [*found["results"], found["reference"]]:
        assert row["tasks"].keys() == {"made_lines", "made_capitals"}
        assert 0 <= row["tasks"]["made_capitals"]["acc,none"] <= 1
        assert row["nll"] > 0
    assert found["tasks"]["made_lines"]["samples"] == 3
    shown = CliRunner().invoke(app, [*map(str, command[:2]), *map(str, command[-4:]), "--bits", "2"]).stdout
    assert "made_lines bits_per_byte" in shown
    assert "made_capitals acc_norm" in shown
    assert "bpw read" not in shown, "there was no text"


def test_what_cannot_be_run_is_said(quantized: Path, tasks: Path, tmp_path: Path) -> None:
    def said(*named: str, **options: Any) -> str:
        with pytest.raises(UsageError) as caught:
            evaluate(quantized, tasks=named or str(tasks), device="cpu", **options)
        return caught.value.sentence

    assert "knows no task hellaswagg; did you mean" in said("hellaswagg")
    assert "there is no file or folder" in said(str(tmp_path / "nowhere.yaml"))
    assert "describes no task" in said(str(tmp_path))
    assert "no task is given" in said(" , ")
    assert "limit must be above 0" in said(limit=0)
    assert "num_fewshot must be at least 0" in said(num_fewshot=-1)
    assert "batch_size must be at least 1" in said(batch_size=0)
    assert "has no chat template" in said(apply_chat_template=True)
    broken = write_tasks(tmp_path / "broken")
    (broken / "made_capitals.jsonl").unlink()
    with pytest.raises(InputError, match="made_capitals fail"):
        evaluate(quantized, tasks=str(broken / "made_capitals.yaml"), device="cpu")


def test_the_harness_has_our_models_by_name(quantized: Path, tasks: Path) -> None:
    import bitstrata.integrations.lm_eval  # noqa: F401  (registers them)

    found = evaluate(quantized, tasks=str(tasks), bits=3, device="cpu")
    arguments: dict[str, Any] = {"pretrained": str(quantized), "bits": 3}
    check_equal(harness(tasks, "bitstrata", model_args=arguments, device="cpu"), found.results[0].tasks)
    with pytest.raises(UsageError, match="must be a folder"):
        harness(tasks, "bitstrata", model_args={"pretrained": None}, device="cpu")


def test_the_harness_loads_a_checkpoint_as_a_model_of_transformers(quantized: Path, tasks: Path) -> None:
    """With `import bitstrata` before, at the highest bits."""
    found = evaluate(quantized, tasks=str(tasks), bits=4, device="cpu")
    arguments = {"pretrained": str(quantized), "dtype": "float32"}
    check_equal(harness(tasks, "hf", model_args=arguments, device="cpu"), found.results[0].tasks)
