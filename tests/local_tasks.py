"""Three tasks of lm-evaluation-harness with data made here, so that nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path

CAPITALS = {"France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Spain": "Madrid", "Egypt": "Cairo", "Peru": "Lima"}
ANIMALS = ("cat", "dog", "horse", "cow", "sheep", "duck", "goat", "pig")
YAML = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
doc_to_text: "{{{{question}}}}"
{rest}metadata:
  version: 1.0
"""
CHOICE = """\
output_type: multiple_choice
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
"""
GENERATE = """\
output_type: generate_until
doc_to_target: "{{answer}}"
generation_kwargs:
  until: [";"]
  max_gen_toks: 12
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""

ROLLING = """\
output_type: loglikelihood_rolling
doc_to_target: "{{question}}"
metric_list:
  - metric: byte_perplexity
  - metric: bits_per_byte
"""


def write_tasks(folder: Path) -> Path:
    """The folder, with `made_capitals`, a multiple choice, `made_lists`, which generates, and `made_lines`, a loss."""
    cities, questions = list(CAPITALS.values()), []
    for number, (country, city) in enumerate(CAPITALS.items()):
        others = [name for name in cities if name != city]
        choices = [others[number % 5], others[(number + 2) % 5]]
        choices.insert(number % 3, city)
        questions.append({"question": f"The capital of {country} is", "choices": choices, "answer": number % 3})
    lists = [", ".join(ANIMALS[(first + step) % len(ANIMALS)] for step in range(3)) for first in range(len(ANIMALS))]
    repeated = [{"question": f"Say: {said}; Say: {said}; Say:", "answer": f" {said}"} for said in lists]
    folder.mkdir(parents=True, exist_ok=True)
    tasks = {"capitals": (questions, CHOICE), "lists": (repeated, GENERATE), "lines": (questions, ROLLING)}
    for name, (rows, rest) in tasks.items():
        name = f"made_{name}"
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        (folder / f"{name}.yaml").write_text(YAML.format(name=name, data=data, rest=rest), encoding="utf-8")
    return folder
