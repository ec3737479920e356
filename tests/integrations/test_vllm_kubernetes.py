"""The Kubernetes example of the vLLM guide: its parts refer to each other, and its flags to what there is."""

from __future__ import annotations

import ast
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from bitstrata.integrations.vllm.options import ServeOptions

MANIFEST = Path(__file__).parents[2] / "docs" / "guides" / "vllm-kubernetes.yaml"


@pytest.fixture(scope="module")
def objects() -> dict[str, dict]:
    return {one["kind"]: one for one in yaml.safe_load_all(MANIFEST.read_text())}


@pytest.fixture(scope="module")
def container(objects) -> dict:
    (only,) = objects["Deployment"]["spec"]["template"]["spec"]["containers"]
    return only


def test_the_service_finds_the_pods(objects):
    template = objects["Deployment"]["spec"]["template"]
    assert objects["Deployment"]["spec"]["selector"]["matchLabels"] == template["metadata"]["labels"]
    assert objects["Service"]["spec"]["selector"].items() <= template["metadata"]["labels"].items()


def test_ports_and_volumes_that_are_named_exist(objects, container):
    ports = {port["name"] for port in container["ports"]}
    probes = [container[f"{kind}Probe"]["httpGet"]["port"] for kind in ("startup", "readiness", "liveness")]
    assert {*probes, *(port["targetPort"] for port in objects["Service"]["spec"]["ports"])} <= ports
    volumes = {volume["name"] for volume in objects["Deployment"]["spec"]["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes


def test_classes_and_options_exist(container):
    flags = dict(arg[2:].split("=", 1) for arg in container["args"] if arg.startswith("--") and "=" in arg)
    for flag in ("logits-processors", "scheduler-cls", "middleware"):
        module, _, name = flags[flag].replace(":", ".").rpartition(".")
        tree = ast.parse(Path(find_spec(module).origin).read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    options = ServeOptions.parse(json.loads(flags["hf-overrides"])["bitstrata"])
    options.make_policy()
    names = container["args"][container["args"].index("--served-model-name") + 1 :]
    assert {name.partition(":")[2] for name in names} == {"", "2", "3", "4", *options.plans}
