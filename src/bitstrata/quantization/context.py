"""What a job knows and what its stages are: the settings with all that preflight found, and the state while it runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..calibration import BlockRunner, Windows, text_name
from ..calibration.block_runner import TOKENS_PER_BATCH
from ..calibration.widening import may_stay_narrow
from ..checkpoint import LayerSpec, QuantizationSpec, format_version
from ..checkpoint.schema import CONFIG_FILE, is_plane, tensor_bytes
from ..metrics import Metrics
from ..models import Discovery, HeadLayer, LinearInfo, SourceModel
from ..models.experts import active_experts, experts_of
from ..planes import PlaneWeight, decode
from ..progress import log
from ..solvers.method import MomentsMethod
from .block_task import BlockTask
from .chains import ORIGINAL, Chains
from .companions import companions
from .expert_inputs import expert_bytes
from .settings import Settings
from .state import JobState
from .team import Team
from .weights import Widened

# What names, shapes and digests take, at most: of a tensor in the headers of its parts and of its shard, and in the
# index; of a layer in config.json and the report.
TENSOR_TEXT = 640
LAYER_TEXT = 1024

Need = Literal["windows"]


class Stage(ABC):
    """A part of a job that leaves a durable result, and does nothing where an earlier run left it.

    needs: windows of calibration text.
    divided: whether several processes do it together; else the leader does it, and the others wait.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()
    divided: ClassVar[bool] = False

    @abstractmethod
    def memory(self, prepared: Prepared) -> int:
        """Its peak memory where it computes, in bytes, estimated; hidden states are counted apart."""

    def disk(self, prepared: Prepared) -> int:
        """The bytes of its result in the job folder."""
        return 0

    def passing_disk(self, prepared: Prepared) -> int:
        """The bytes of what the job folder holds beside results while it runs, such as chains of hidden states."""
        return 0

    def operations(self, prepared: Prepared) -> dict[torch.dtype, float]:
        """How many multiplications and additions its products take, by their dtype; none where other work is more."""
        return {}

    @abstractmethod
    def run(self, job: Job) -> None:
        """Do it, in every process where it is divided. Raises JobError where an earlier run's result is damaged."""

    def left(self, job: Job) -> None:  # noqa: B027
        """What a process that has waited does once the leader is through."""


@dataclass(frozen=True)
class MemoryNeed:
    """An estimate of a job's peak, in bytes: main memory, and the memory of the GPU it runs on, if it does."""

    main: int
    gpu: int = 0

    def __str__(self) -> str:
        return f"{megabytes(self.main)} of memory" + (f" and {megabytes(self.gpu)} of GPU memory" if self.gpu else "")


def megabytes(size: int) -> str:
    """A size for people: MB below a gigabyte, else GB (powers of ten)."""
    return f"{size / 1e6:.1f} MB" if size < 1e9 else f"{size / 1e9:.2f} GB"


@dataclass(frozen=True)
class Prepared:
    """A job that passed preflight.

    common: state-dict name -> stored name of what is copied unchanged.
    head: the output head and the embedding, if they are quantized too.
    mtp: stored names of layers beside the model that predict further tokens.
    fingerprint: everything the result depends on; decides whether a job may be resumed.
    """

    settings: Settings
    stages: tuple[Stage, ...]
    source: SourceModel
    model: PreTrainedModel
    discovery: Discovery
    windows: Windows | None
    common: dict[str, str]
    fingerprint: dict[str, Any]
    head: tuple[HeadLayer, ...] = ()
    mtp: tuple[str, ...] = ()

    @property
    def hidden_size(self) -> int:
        """The width of hidden states."""
        return int(self.model.config.get_text_config(decoder=True).hidden_size)

    @property
    def vocabulary(self) -> int:
        """Tokens that the model tells apart."""
        return int(self.model.config.get_text_config(decoder=True).vocab_size)

    @property
    def heldout_bytes(self) -> int:
        """Of the held-out chains: the original's, and of each bits its own, round-to-nearest's and the tuned one."""
        if self.windows is None:
            return 0
        chains = 1 + (2 + (self.settings.method.tuning is not None)) * len(self.settings.bits)
        return self.windows.heldout.numel() * self.hidden_size * 4 * chains

    @cached_property
    def expert_bytes(self) -> int:
        """What calibrating experts takes in memory; their inputs are files."""
        settings = self.settings
        if self.windows is None or not isinstance(settings.method, MomentsMethod) or not settings.method.needs:
            return 0
        experts, most = experts_of((linear.name for linear in self.discovery.linears), self.model), 0
        for linear in self.discovery.linears:
            if linear.name in experts and linear.name.endswith(".down_proj"):
                count = experts[linear.name][1]
                chosen = active_experts(self.source.config, count) or count
                tokens, inner = self.windows.calibration.numel(), linear.in_features
                most = max(most, expert_bytes(tokens, chosen, linear.out_features, inner, len(settings.bits)))
        return most

    @cached_property
    def shares(self) -> dict[str, float]:
        """Linear -> the share of all tokens that goes through it: of an expert's, on the average."""
        found = {linear.name: 1.0 for linear in self.discovery.linears}
        for name, (_, count) in experts_of(found, self.model).items():
            found[name] = (active_experts(self.source.config, count) or count) / count
        return found

    def spec(self) -> QuantizationSpec:
        """The `quantization_config` of the result."""
        settings = self.settings
        layers = {}
        experts = experts_of((linear.name for linear in self.discovery.linears), self.model)
        for linear in self.discovery.linears:
            stored, count = experts.get(linear.name, (linear.name, None))
            layers[stored] = LayerSpec(
                in_features=linear.in_features,
                out_features=linear.out_features,
                bias=linear.bias,
                decoder=settings.method.scales_kind(settings.bits),
                experts=count,
                active=None if count is None else active_experts(self.source.config, count),
            )
        if settings.head_bits is not None:
            layers.update({layer.name: layer.spec(settings.head_bits) for layer in self.head})
        return QuantizationSpec(
            format_version=format_version(layers.values()),
            method=settings.method.name,
            method_options=settings.fingerprint()["options"],
            bits=list(settings.bits),
            group_size=settings.group_size,
            layers=layers,
            provenance={
                "model": Path(settings.model).name or settings.model,
                "calibration": None if settings.calibration is None else text_name(settings.calibration),
                **self.fingerprint,
            },
        )

    def stored_bytes(self, layers: tuple[LinearInfo, ...] | tuple[HeadLayer, ...], *, planes: bool = True) -> int:
        """Bytes of the scales of these layers, and of their planes."""
        spec = self.spec()
        tensors = {name: shape for layer in layers for name, shape in spec.layer_tensors(layer.name).items()}
        return sum(tensor_bytes(shape) for name, shape in tensors.items() if planes or not is_plane(name))

    @cached_property
    def disk_bytes(self) -> int:
        """The most that the output takes at a time: the stages' results, and the larger of

        what a stage takes while it runs, such as chains of hidden states and what is kept of a block;
        the checkpoint (planes and scales, unquantized tensors, files beside the weights) and the held-out chains.
        """
        spec, source = self.spec(), self.source
        kept = () if self.settings.drop_mtp else self.mtp
        found = [source.kept_as(stored) for stored in (*self.common.values(), *kept)]
        copied = sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in found)
        copied += sum(path.stat().st_size for path in [source.folder / CONFIG_FILE, *companions(source)])
        tensors = len(self.common) + sum(len(spec.layer_tensors(name)) + 1 for name in spec.layers)
        text = tensors * TENSOR_TEXT + (len(spec.layers) + len(self.discovery.left_out)) * LAYER_TEXT
        results = sum(stage.disk(self) for stage in self.stages)
        final = sum(map(spec.layer_bytes, spec.layers)) + copied + self.heldout_bytes
        return results + text + max(final, *(stage.passing_disk(self) for stage in self.stages))

    @cached_property
    def _held(self) -> dict[str, int]:
        """Parameter -> its bytes while it is in memory."""
        narrow, found = may_stay_narrow(self.model, ""), {}
        for name, parameter in self.model.named_parameters():
            stored = self.source.stored_name(name) if name in narrow else None
            found[name] = parameter.numel() * (4 if stored is None else min(4, self.source.spec(stored)[0].itemsize))
        return found

    @property
    def linear_bytes(self) -> int:
        """Of all linears that are quantized, as they are held."""
        return sum(self._held[f"{linear.name}.weight"] for linear in self.discovery.linears)

    @cached_property
    def parameter_bytes(self) -> tuple[int, list[int]]:
        """As they are held (calibration/widening.py): what lies outside the blocks, and each block."""
        inside = dict.fromkeys(self.discovery.blocks, 0)
        outside = 0
        for name, size in self._held.items():
            block = next((block for block in inside if name.startswith(f"{block}.")), None)
            if block is None:
                outside += size
            else:
                inside[block] += size
        return outside, list(inside.values())

    @cached_property
    def memory(self) -> MemoryNeed:
        """An estimate of the peak: that of the stage that takes most (`Stage.memory`) and

            hidden states of what runs at a time: 4 batches x hidden x 4 bytes
            what calibrating experts takes (`expert_bytes`)

        The interpreter and its libraries, about 0.4 GB, come on top. On a GPU all but the hidden states is there; main
        memory holds those, and what is on its way: whatever of the model is in memory at a time.
        """
        hidden, settings = 0, self.settings
        if self.windows is not None:
            tokens = 4 * max(TOKENS_PER_BATCH, settings.seq_len)
            hidden = tokens * self.hidden_size * 4 + self.expert_bytes
        work = max(stage.memory(self) for stage in self.stages)
        if settings.device.type == "cpu":
            return MemoryNeed(work + hidden)
        outside, inside = self.parameter_bytes
        return MemoryNeed(max(outside, *inside) + hidden, work)


@dataclass
class Job:
    """A job that runs: its durable state, and what its stages leave in memory for each other.

    layer_error: layer -> bits -> ||W - W_bits||^2 / ||W||^2.
    routing: module of experts -> how many tokens of the learning windows each expert gets in the original.
    measured: what the final check found, by chain name.
    team: the processes that work on it.
    first_block: called with the seconds that the first block took that was solved in this run, if more follow.
    """

    prepared: Prepared
    state: JobState
    team: Team = field(default_factory=Team)
    layer_error: dict[str, dict[str, float]] = field(default_factory=dict)
    routing: dict[str, list[int]] = field(default_factory=dict)
    measured: dict[str, Metrics] = field(default_factory=dict)
    first_block: Callable[[float], None] = lambda seconds: None

    def __post_init__(self) -> None:
        prepared = self.prepared
        self.settings, self.discovery = prepared.settings, prepared.discovery
        self.runner = BlockRunner(
            prepared.source, prepared.model, prepared.discovery, self.settings.seq_len, self.settings.device
        )
        self.chains = Chains(self.runner, self.state.folder, team=self.team)

    @property
    def windows(self) -> Windows:
        """The text's windows; a stage that needs some has them."""
        assert self.prepared.windows is not None
        return self.prepared.windows

    def planes(self, index: int) -> dict[str, PlaneWeight]:
        """The finished block's layers."""
        return self.state.load(index, [linear.name for linear in self.discovery.of_block(index)])

    def embedding(self) -> dict[str, Tensor]:
        """Parameter name -> decoded weight, fp32, of the embedding; empty without `--head-bits`."""
        return {
            f"{layer.name}.weight": self._decoded(layer) for layer in self.prepared.head if layer.role == "embedding"
        }

    def output(self) -> dict[str, Tensor]:
        """The same of the output head."""
        head = [layer for layer in self.prepared.head if layer.tied is not None or layer.role == "head"]
        return {f"{layer.tied or layer.name}.weight": self._decoded(layer) for layer in head}

    def _decoded(self, layer: HeadLayer) -> Tensor:
        (weight,) = self.state.load(layer.role, [layer.name]).values()
        return decode(weight, weight.bits[0])

    def task(self, index: int, block: nn.Module) -> BlockTask:
        """Block `index`, which is in memory, with what the chains have for it."""
        name, linears, seed = self.discovery.blocks[index], self.discovery.of_block(index), self.settings.seed
        learning = self.chains.learning
        weights = {}
        for linear in linears:
            parameter = block.get_submodule(linear.name.removeprefix(f"{name}.")).weight
            assert isinstance(parameter, Tensor)
            weights[linear.name] = (parameter.T if linear.transposed else parameter).detach().contiguous()
        return BlockTask(
            block=block,
            prefix=f"{name}.",
            weights=Widened(weights),
            transposed=frozenset(linear.name for linear in linears if linear.transposed),
            bits=self.settings.bits,
            group_size=self.settings.group_size,
            call=lambda module, hidden: self.runner.call(index, module, hidden),
            inputs=learning.get(ORIGINAL),
            targets=None,
            chains={bits: learning[str(bits)] for bits in self.settings.bits} if learning else {},
            batch=self.runner.batch,
            dtype=self._dtype(index, block),
            scratch=self.state.folder,
            team=self.team,
            generator=torch.Generator().manual_seed(seed * 1_000_003 + index),
            say=lambda message: log.info(f"  {name}: {message}"),
        )

    def _dtype(self, index: int, block: nn.Module) -> torch.dtype:
        """What the products of block `index` are made in: fp32 where the settings' dtype does not serve it."""
        dtype, original = self.settings.dtype, self.chains.learning.get(ORIGINAL)
        if dtype == torch.float32 or original is None or self.runner.works_in(dtype, index, block, original):
            return dtype
        log.info(f"  {self.discovery.blocks[index]}: products in fp32, because in {dtype} they are too far from it")
        return torch.float32

    def quantize(self, task: BlockTask, planes: dict[str, PlaneWeight], bits: int) -> None:
        """Put the weights at `bits` into the block, and note how far they are from the original's."""
        for name, weight in task.weights.items():
            dense = decode(planes[name], bits).to(weight.device)
            error = torch.dist(dense, weight).square() / weight.norm().square().clamp_min(1e-30)
            self.layer_error.setdefault(name, {})[str(bits)] = float(error)
            task.put({name: dense})
