"""`bitstrata.env`: versions, machine, and which kernels can run here, with the reason where one cannot."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import psutil
import torch

from ..kernels import cpu, describe
from ..options import EnvOptions
from ..verbs import verb
from ..version import __version__

PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "tokenizers", "huggingface-hub", "numpy")


@dataclass(frozen=True)
class Environment:
    """What `bitstrata env` reports."""

    bitstrata: str
    python: str
    packages: dict[str, str | None]
    system: str
    processor: str
    isa: str
    cores: int
    threads: int
    memory_bytes: int
    gpus: tuple[str, ...]
    kernels: tuple[dict[str, Any], ...]
    native: str  # why the native CPU kernels are missing; empty if they are not

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        packages = ", ".join(f"{name} {found or 'missing'}" for name, found in self.packages.items())
        lines = [
            f"bitstrata  {self.bitstrata}",
            f"python     {self.python}",
            f"packages   {packages}",
            f"system     {self.system}",
            f"processor  {self.processor}, {self.isa}, {self.cores} cores, {self.threads} threads",
            f"memory     {self.memory_bytes / 1e9:.1f} GB",
            f"gpu        {', '.join(self.gpus) or 'none'}",
        ]
        for kernel in self.kernels:
            if kernel["priority"] >= 0:
                lines.append(f"kernel     {kernel['name']} ({kernel['device']}): {kernel['reason'] or 'can run'}")
        variants = [kernel["name"] for kernel in self.kernels if kernel["priority"] < 0 and kernel["reason"] is None]
        if variants:
            lines.append(f"           when forced by BITSTRATA_KERNEL also {', '.join(variants)}")
        if self.native:
            lines.append(f"kernel     {self.native}; install again where there is a C++17 compiler (GCC or Clang)")
        return "\n".join(lines)


@verb(EnvOptions)
def env(options: EnvOptions) -> Environment:
    """Describe this machine and installation."""
    gpus = tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    kernels = [
        {"name": report.name, "device": device, "priority": report.priority, "reason": report.reason}
        for device in (["cpu", "cuda"] if gpus else ["cpu"])
        for report in describe(device, torch.float32)
    ]
    return Environment(
        bitstrata=__version__,
        python=platform.python_version(),
        packages={name: _version(name) for name in PACKAGES},
        system=f"{platform.system()} {platform.release()}",
        processor=platform.machine(),
        isa=torch.backends.cpu.get_cpu_capability(),
        cores=psutil.cpu_count(logical=True) or 1,
        threads=torch.get_num_threads(),
        memory_bytes=psutil.virtual_memory().total,
        gpus=gpus,
        kernels=tuple(kernels),
        native=cpu.missing,
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
