"""What the operator of a server sets: `vllm serve OUT --hf-overrides '{"bitstrata": {"bits": 3, "max_bits": 4}}'`.

That is the one door of vLLM whose contents reach the server, the engine and every worker, on other machines too, as a
part of the model's config. `--additional-config` is not there yet when a quantization config is made, and environment
variables do not reach other machines.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...checkpoint import CheckpointReader, QuantizationSpec
from ...errors import UnsupportedBitsError, UsageError
from ...planes.weights import MAX_BITS
from ...plans import Plan, check_plan_name
from ...runtime import POLICIES, LoadPolicy, Policy, parse_policy
from .offered import Offered

FIELD = "bitstrata"
_Bits = Annotated[int, Field(ge=1, le=MAX_BITS)]
_Name = Annotated[str, Field(pattern="[^0-9]")]  # of a plan


class ServeOptions(BaseModel):
    """The options of one server.

    Args:
        bits: of requests that ask for none, or a plan's name; the highest that is loaded if None.
        max_bits: planes and scales above it are not loaded, except for layers where a plan asks for them.
        plans: files by the name that requests give; read once, where the server starts.
        policy: what lowers requests that may be lowered, `load:target_ms=50`; nothing if None.
        min_bits: how far, for requests that do not say.
        draft_bits: of drafts, where vLLM is told to speculate with the same checkpoint; the lowest if None.
        share_prefixes: requests may go on from keys and values that were computed at other bits.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    bits: _Bits | _Name | None = None
    max_bits: _Bits | None = None
    plans: dict[str, str] = Field(default_factory=dict)
    policy: str | None = None
    min_bits: _Bits | None = None
    draft_bits: _Bits | None = None
    share_prefixes: bool = False

    @classmethod
    def parse(cls, raw: Any) -> ServeOptions:
        """The options from what was overridden in a model's config, None if nothing was; raises UsageError."""
        try:
            return cls.model_validate({} if raw is None else raw)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in (FIELD, *first["loc"]))
            known = ", ".join(cls.model_fields)
            raise UsageError(f"--hf-overrides: {field}: {first['msg']}", hint=f"options: {known}") from error

    @property
    def most_bits(self) -> int:
        return MAX_BITS if self.max_bits is None else self.max_bits

    def make_policy(self) -> Policy:
        """A new policy. Raises UsageError for one that is not known, or that chooses bits anew for each token."""
        policy = parse_policy("fixed" if self.policy is None else self.policy)
        if type(policy) not in (Policy, LoadPolicy):
            known = ", ".join(name for name, kind in POLICIES.items() if kind in (Policy, LoadPolicy))
            raise UsageError(
                f"policy {self.policy!r} changes the bits of a request while it runs, which vLLM's scheduler cannot",
                hint=f"one of {known}",
            )
        return policy

    def offer(self, spec: QuantizationSpec, checkpoint: CheckpointReader | None = None) -> Offered:
        """What a server of this model offers.

        Raises UsageError for options that do not fit it, PlanError for a plan that cannot be read or was made for
        another model; for other weights of the same layers only where the `checkpoint` itself is at hand.
        """
        bits = tuple(bits for bits in spec.bits if bits <= self.most_bits)
        if not bits:
            raise UnsupportedBitsError(f"<= {self.max_bits}", spec.bits, where="this checkpoint")
        plans = {}
        for name, file in self.plans.items():
            check_plan_name(name, f"--hf-overrides: {FIELD}.plans", '"plans": {"NAME": "FILE"}')
            plan = Plan.load(Path(file))
            plan.check(checkpoint or spec)
            plans[name] = dict(plan)
        return Offered(bits, max(bits) if self.bits is None else self.bits, plans, self.min_bits)


def bits_of_linears(spec: QuantizationSpec, offered: Offered) -> dict[str, tuple[int, ...]]:
    """The bits of all that a plan names, each expert apart: one value for each of the choices that are offered."""
    return {
        name: tuple(one if isinstance(one, int) else offered.plans[one][name] for one in offered.choices)
        for name in spec.planned_layers
    }
