"""`bitstrata plan` and plans on the command line; bad input is refused by name."""

from __future__ import annotations

import json
import shutil

import pytest

from bitstrata.checkpoint import CheckpointReader, Fingerprint
from bitstrata.plans import Plan


@pytest.fixture(scope="module")
def planned(quantized, model, text, tmp_path_factory):
    """A checkpoint with its layers measured, and a plan for it."""
    from bitstrata.cli.main import run

    folder = shutil.copytree(quantized, tmp_path_factory.mktemp("planned") / "out")
    arguments = ["plan", folder, "--budget", "4.5bpw", "--text", text, "--reference", model, "-o", folder / "p.json",
                 "--windows", 4, "--seq-len", 32]  # fmt: skip
    assert run([str(argument) for argument in arguments]) == 0
    return folder


def test_a_plan_as_a_table_and_as_json(cli, planned):
    shown = cli("plan", planned, "--budget", "4.5bpw")
    assert shown.code == 0
    assert "this plan" in shown.out
    result = cli("plan", planned, "--budget", "4.5bpw", "--solver", "milp", "--json")
    assert result.code == 0
    found = json.loads(result.out)
    assert found["bpw"] <= 4.5
    assert found["total_bytes"] == found["weight_bytes"] + found["fixed_bytes"]
    assert set(found["bits"]) == set(CheckpointReader(planned).spec.planned_layers)


def test_plans_are_taken_by_eval_and_generate(cli, planned, text):
    result = cli("eval", planned, "--text", text, "--bits", f"2,{planned / 'p.json'}", "--json")
    assert result.code == 0
    assert [row["bits"] for row in json.loads(result.out)["results"]] == [2, "p"]
    result = cli("generate", planned, "a", "--bits", planned / "p.json", "--max-new-tokens", 2)
    assert result.code == 0
    assert "plan p" in result.err


def test_eval_has_a_row_for_everything_that_was_asked_for(cli, planned, text, tmp_path):
    for name in ("same", "deeper/p"):
        (tmp_path / f"{name}.json").parent.mkdir(exist_ok=True)
        shutil.copy(planned / "p.json", tmp_path / f"{name}.json")
    shutil.copy(planned / "p.json", tmp_path / "2.json")
    files = [planned / "p.json", tmp_path / "same.json", tmp_path / "deeper" / "p.json", tmp_path / "2.json"]
    result = cli("eval", planned, "--text", text, "--bits", ",".join(map(str, [2, *files])), "--json")
    assert result.code == 0
    rows = json.loads(result.out)["results"]
    assert [row["bits"] for row in rows] == [2, str(files[0]), "same", str(files[2]), str(files[3])]
    assert len({json.dumps({**row, "bits": None}) for row in rows[1:]}) == 1


def test_every_file_that_is_written_is_named(cli, planned, tmp_path):
    result = cli("plan", planned, "--budget", "4.5bpw", "-o", tmp_path / "new.json")
    assert f"wrote {tmp_path / 'new.json'}" in result.err


def test_the_last_bound_that_matches_holds(cli, planned):
    bounds = ("--max-bits", "*=4", "--max-bits", "*.down_proj=3", "--max-bits", "*=2")
    result = cli("plan", planned, "--budget", "1GB", *bounds, "--json")
    assert result.code == 0
    assert set(json.loads(result.out)["bits"].values()) == {2}


def test_a_plan_is_of_no_bits(cli, planned):
    cli("plan", f"{planned}:3", "--budget", "4bpw").refused(
        3, f"{planned}:3", "bits do not belong here", f"give {planned}"
    )


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (("--budget", "3.2bpw"), 2, "below the smallest"),
        (("--budget", "1B"), 2, "bytes"),
        (("--budget", "600"), 2, "no unit"),
        (("--budget", "much"), 2, "the budget 'much'"),
        (("--budget", "4bpw", "--solver", "luck"), 2, "solver 'luck'"),
        (("--budget", "4bpw", "--measure", "eye"), 2, "'eye'"),
        (("--budget", "4bpw", "--min-bits", "*.q_proj"), 2, "--min-bits"),
        (("--budget", "4bpw", "--max-bits", "*.x=3"), 2, "matches no layer"),
        (("--budget", "4bpw", "--min-bits", "4"), 2, "need at least"),
        (("--budget", "4bpw", "--text", "nowhere.txt"), 3, "nowhere.txt"),
        (("--budget", "4bpw", "--sensitivity", "nowhere.json"), 2, "nowhere.json"),
        (("--budget", "4bpw", "-o", "no/where/plan.json"), 2, "there is no folder no/where"),
        (("--budget", "4bpw", "-o", "."), 2, "it is a folder"),
        (("--budget", "4bpw", "--plot", "picture.doc"), 2, "picture.doc"),
        (("--budget", "4bpw", "--windows", "8", "--reference", "x"), 2, "reference, windows would change nothing"),
        (("--budget", "4bpw", "--windows", "0"), 2, "windows must be at least 1"),
    ],
)
def test_bad_arguments(cli, planned, arguments, code, named):
    result = cli("plan", planned, *arguments)
    assert result.code == code
    assert named in result.err
    assert "Traceback" not in result.err


def test_too_large_a_budget_is_said(cli, planned):
    result = cli("plan", planned, "--budget", "1TB")
    assert result.code == 0
    assert "above the whole model" in result.err


def test_a_sensitivity_file_that_does_not_match(cli, planned, text, tmp_path):
    result = cli("plan", planned, "--budget", "4bpw", "--text", text, "--windows", 4, "--seq-len", 32)
    assert result.code == 3
    assert "another reference" in result.err
    (tmp_path / "s.json").write_text("{}")
    result = cli("plan", planned, "--budget", "4bpw", "--sensitivity", tmp_path / "s.json")
    assert result.code == 3
    assert "s.json" in result.err


@pytest.mark.parametrize("verb", ["eval", "generate"])
def test_plans_that_cannot_be_used(cli, planned, text, tmp_path, verb):
    def run(path):
        rest = ("--text", text) if verb == "eval" else ("a",)
        return cli(verb, planned, *rest, "--bits", path)

    plan = Plan.load(planned / "p.json")
    (tmp_path / "broken.json").write_text("{")
    other = plan.model.model_copy(update={"layout": "0" * 64})
    Plan(plan.bits, other).save(tmp_path / "foreign.json")
    first = next(iter(plan))
    Plan({**plan, first: 7}, Fingerprint.of(CheckpointReader(planned))).save(tmp_path / "high.json")
    for name, said in [
        ("broken", "not valid JSON"),
        ("foreign", "foreign was made for another model"),
        ("high", f"7 bits of layer {first}"),
        ("nowhere", "there is no plan"),
    ]:
        result = run(tmp_path / f"{name}.json")
        assert result.code == 3, name
        assert said in result.err
    assert run("2,x").code == 2


def test_generate_takes_one_precision(cli, planned):
    result = cli("generate", planned, "a", "--bits", "2,3")
    assert result.code == 2
    assert "several" in result.err
