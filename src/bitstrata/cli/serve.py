"""`bitstrata serve`."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoint import CheckpointReader
from ..errors import UsageError
from ..models import end_tokens, load_tokenizer, resolve
from ..options import ServeOptions, ServerSettings
from ..plans import Plan, bits_name, check_plan_name, choose_bits, parse_bits_or_plan
from ..progress import log, note
from ..runtime import Engine, parse_policy
from ..runtime.batching import check_reuse
from .sizing import load_sized

if TYPE_CHECKING:
    from ..serve.settings import Settings

PACKAGES = ("fastapi", "uvicorn", "prometheus_client", "llguidance")
FIT_CACHE_TOKENS = 512  # for each request
LOCAL = ("127.0.0.1", "localhost", "::1")


def run(options: ServeOptions) -> None:
    missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise UsageError(
            f"the server needs {', '.join(missing)}, not installed here", hint="pip install 'bitstrata[serve]'"
        )
    from ..serve.app import create_app
    from ..serve.process import address, bind, serve

    key = options.api_key
    if key is not None and not (key.isascii() and key.isprintable() and key.strip()):
        raise UsageError("the API key must be printable ASCII and not empty", hint="check --api-key, BITSTRATA_API_KEY")
    if key is None and options.host not in LOCAL:
        note(f"anyone who reaches {options.host} can use this server: it has no --api-key")
    model = _Model.of(options)
    rule = parse_policy(options.policy)
    check_reuse(options.reuse)
    with bind(options.host, options.port) as bound:
        folder = resolve(model.target, hub=options.hub, kind="bitstrata checkpoint")
        if model.plans:
            checkpoint = CheckpointReader(folder)
            for made in model.plans.values():
                made.check(checkpoint)
        settings = _settings(options, model, folder, bound.getsockname()[0])
        cache_tokens = options.cache_tokens
        if options.fit and cache_tokens is None:  # the cache must be the one that room was left for
            cache_tokens = options.max_requests * FIT_CACHE_TOKENS
        loaded = load_sized(model.target, model.bits, options, context=cache_tokens)
        tokenizer = load_tokenizer(folder)
        if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in end_tokens(loaded):
            note(
                f"the tokenizer's end of text, {tokenizer.eos_token} ({tokenizer.eos_token_id}), is not among those of "
                "generation_config.json and config.json; replies end at it too"
            )
        engine = Engine(
            loaded,
            tokenizer,
            max_requests=options.max_requests,
            cache_tokens=cache_tokens,
            max_waiting=options.max_waiting,
            policy=rule,
            reuse=options.reuse,
            kv_cache_dtype=options.kv_cache_dtype,
        )
        with engine:
            app = create_app(engine, tokenizer, settings)
            catalog = app.state.service.catalog
            chosen_name = bits_name(catalog.default.given)
            choice = ", ".join(map(str, catalog.precisions))
            what = f"bits {choice} ({chosen_name} by default)" if choice else f"plan {chosen_name}"
            ready = f"serving {settings.name} at {address(bound)}/v1 with {what}"
            serve(app, bound, grace=options.grace, say=log.info, ready=ready)


@dataclass(frozen=True)
class _Model:
    """Which model, at which bits or plan by default, and the plans that requests may choose."""

    target: str
    bits: int | None
    default: str | None
    plans: dict[str, Plan]

    @classmethod
    def of(cls, options: ServeOptions) -> _Model:
        """Raises UsageError for choices that exclude each other."""
        plans, bits = _plans(options.plan), options.bits
        default = bits if bits in plans else None  # a plan's name
        target, chosen = choose_bits(options.model, None if bits is None or default else parse_bits_or_plan(bits))
        if default and chosen is not None:
            raise UsageError(f"bits are given twice: {options.model} and --bits {bits}", hint="give one of them")
        if isinstance(chosen, Plan):
            default, chosen = _add(plans, chosen.name, chosen, "--bits"), None
        is_sized = options.budget is not None or options.fit
        given = (bits, chosen, plans or None, options.min_bits, None if options.policy == "fixed" else options.policy)
        if is_sized and any(value is not None for value in given):
            raise UsageError(
                "with --budget or --fit the model holds one plan's pages and runs nothing else",
                hint="leave --bits, --plan, --policy and --min-bits out",
            )
        return cls(target, chosen, default, plans)


def _settings(options: ServeOptions, model: _Model, folder: Path, host: str) -> Settings:
    """What the server is told; `host` is the address that it listens at."""
    from ..serve.process import is_loopback, most_requests
    from ..serve.settings import ANY, Settings

    hosts = tuple(given.lower() for given in options.allowed_host)
    if not hosts and not is_loopback(host):
        hosts = (ANY,)  # by which names others reach this machine is not known here
    possible = most_requests(options.max_connections)
    if possible < options.max_connections:
        note(
            f"max-connections lowered from {options.max_connections} to {possible}: "
            "what the open files of this process leave (ulimit -n)"
        )
    shared = {one.name: getattr(options, one.name) for one in fields(ServerSettings)}
    return Settings(
        options.served_model_name or (folder.resolve().name if Path(model.target).is_dir() else model.target),
        bits=model.default or model.bits,
        plans=model.plans,
        allowed_hosts=hosts,
        allowed_origins=tuple(options.allowed_origin),
        **shared | {"max_connections": possible},
    )


def _plans(given: Sequence[str]) -> dict[str, Plan]:
    """NAME=FILE, by name. Raises UsageError for a name that requests could not say, PlanError for a file."""
    plans: dict[str, Plan] = {}
    for text in given:
        name, _, file = text.partition("=")
        if not file:
            raise UsageError(f"--plan {text!r} cannot be used", hint="--plan NAME=FILE")
        _add(plans, name, Plan.load(file), "--plan")
    return plans


def _add(plans: dict[str, Plan], name: str, plan: Plan, flag: str) -> str:
    """Put `plan` among the others and return its name. Raises UsageError for one that requests could not say."""
    check_plan_name(name, flag, "--plan NAME=FILE")
    if name in plans:
        raise UsageError(f"{flag}: there are two plans called {name!r}", hint="--plan NAME=FILE gives each a name")
    plans[name] = plan
    return name
