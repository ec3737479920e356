"""`bitstrata serve`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from ..checkpoint import CheckpointReader
from ..errors import UsageError
from ..models import end_tokens, load_tokenizer, resolve
from ..plans import Plan, bits_name, choose_bits, parse_bits_or_plan
from ..progress import log, note
from ..runtime import Engine, parse_policy
from .output import DEVICE_OPTION
from .sizing import BUDGET_OPTION, FIT_OPTION, load_sized

PACKAGES = ("fastapi", "uvicorn", "prometheus_client")
FIT_CACHE_TOKENS = 512  # for each request
LOCAL = ("127.0.0.1", "localhost", "::1")


def command(
    model: Annotated[str, typer.Argument(help="Checkpoint folder or hub id, OUT or OUT:BITS.")],
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 is every one.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes any that is free.", min=0, max=65535)] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="BITSTRATA_API_KEY", help="Key that clients must send; none by default.")
    ] = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="The model's name; by default the folder's or hub id.")
    ] = None,
    bits: Annotated[
        str | None,
        typer.Option(help="For requests that name none: bits, a plan's NAME or file; the highest by default."),
    ] = None,
    plan: Annotated[
        list[str] | None, typer.Option(help="NAME=FILE: a plan that requests choose as MODEL:NAME; repeatable.")
    ] = None,
    policy: Annotated[
        str, typer.Option(help="What lowers bits: fixed, load:target_ms=50, position:tokens=32 or entropy.")
    ] = "fixed",
    min_bits: Annotated[
        int | None, typer.Option(help="How low the policy may go with requests that do not say; not at all by default.")
    ] = None,
    budget: str | None = BUDGET_OPTION,
    fit: bool = FIT_OPTION,
    max_requests: Annotated[int, typer.Option(help="Requests served at a time; others wait.", min=1)] = 16,
    max_waiting: Annotated[int, typer.Option(help="Requests that may wait; more are refused.", min=1)] = 256,
    max_connections: Annotated[int, typer.Option(help="HTTP requests under way; more are refused.", min=1)] = 512,
    max_body: Annotated[int, typer.Option(help="The largest request, in bytes.", min=1)] = 4 * 1024 * 1024,
    max_prompt_tokens: Annotated[
        int | None, typer.Option(help="The longest prompt; by default what context and cache take.", min=1)
    ] = None,
    default_max_tokens: Annotated[
        int, typer.Option(help="New tokens of a chat request that gives no number.", min=1)
    ] = 512,
    cache_tokens: Annotated[
        int | None, typer.Option(help="Room for the prompts and new tokens of all running requests.", min=1)
    ] = None,
    allowed_origin: Annotated[
        list[str] | None, typer.Option(help="A web page's origin that may call the server (CORS); repeatable.")
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            help="A name that clients reach the server by, where they use neither localhost nor its address; "
            "* is any. Repeatable."
        ),
    ] = None,
    grace: Annotated[float, typer.Option(help="Seconds for requests under way when the server closes.", min=0)] = 30.0,
    device: str = DEVICE_OPTION,
) -> None:
    """Serve a model over HTTP as OpenAI does, each request at its own bits. Ctrl-C ends it."""
    missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise UsageError(
            f"the server needs {', '.join(missing)}, not installed here", hint="pip install 'bitstrata[serve]'"
        )
    from ..serve.app import create_app
    from ..serve.process import address, bind, is_loopback, most_requests, serve
    from ..serve.settings import ANY, Settings

    if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key.strip()):
        raise UsageError("the API key must be printable ASCII and not empty", hint="check --api-key, BITSTRATA_API_KEY")
    if api_key is None and host not in LOCAL:
        note(f"anyone who reaches {host} can use this server: it has no --api-key")
    plans = _plans(plan or [])
    default = bits if bits in plans else None  # a plan's name
    target, chosen = choose_bits(model, None if bits is None or default else parse_bits_or_plan(bits))
    if default and chosen is not None:
        raise UsageError(f"bits are given twice: {model} and --bits {bits}", hint="give one of them")
    if isinstance(chosen, Plan):
        default, chosen = _add(plans, chosen.name, chosen, "--bits"), None
    rule = parse_policy(policy)
    has_choice = bits is not None or chosen is not None or plans or min_bits is not None or policy != "fixed"
    if (budget is not None or fit) and has_choice:
        raise UsageError(
            "with --budget or --fit the model holds one plan's pages and runs nothing else",
            hint="leave --bits, --plan, --policy and --min-bits out",
        )
    with bind(host, port) as bound:
        folder = resolve(target, kind="bitstrata checkpoint")
        name = served_model_name or (folder.resolve().name if Path(target).is_dir() else target)
        if plans:
            checkpoint = CheckpointReader(folder)
            for made in plans.values():
                made.check(checkpoint)
        hosts = tuple(given.lower() for given in allowed_host or ())
        if not hosts and not is_loopback(bound.getsockname()[0]):
            hosts = (ANY,)  # by which names others reach this machine is not known here
        possible = most_requests(max_connections)
        if possible < max_connections:
            note(
                f"max-connections lowered from {max_connections} to {possible}: what the open files of this process "
                "leave (ulimit -n)"
            )
        settings = Settings(
            name=name,
            bits=default or chosen,
            min_bits=min_bits,
            plans=plans,
            api_key=api_key,
            default_max_tokens=default_max_tokens,
            max_prompt_tokens=max_prompt_tokens,
            max_body=max_body,
            max_connections=possible,
            allowed_hosts=hosts,
            allowed_origins=tuple(allowed_origin or ()),
        )
        if fit and cache_tokens is None:  # the cache must be the one that room was left for
            cache_tokens = max_requests * FIT_CACHE_TOKENS
        loaded = load_sized(
            target, chosen, budget=budget, fit=fit, context=cache_tokens if fit else None, device=device
        )
        tokenizer = load_tokenizer(folder)
        if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in end_tokens(loaded):
            note(
                f"the tokenizer's end of text, {tokenizer.eos_token} ({tokenizer.eos_token_id}), is not among those of "
                "generation_config.json and config.json; replies end at it too"
            )
        engine = Engine(
            loaded,
            tokenizer,
            max_requests=max_requests,
            cache_tokens=cache_tokens,
            max_waiting=max_waiting,
            policy=rule,
        )
        with engine:
            app = create_app(engine, tokenizer, settings)
            catalog = app.state.service.catalog
            chosen_name = bits_name(catalog.default.given)
            choice = ", ".join(map(str, catalog.precisions))
            what = f"bits {choice} ({chosen_name} by default)" if choice else f"plan {chosen_name}"
            ready = f"serving {name} at {address(bound)}/v1 with {what}"
            serve(app, bound, grace=grace, say=log.info, ready=ready)


def _plans(given: list[str]) -> dict[str, Plan]:
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
    if not name or not name.isascii() or not name.isprintable() or name.isdigit() or set(name) & set(": /"):
        raise UsageError(
            f"{flag}: a plan cannot be called {name!r}",
            hint="--plan NAME=FILE, the name not a number and without spaces, colons and slashes",
        )
    if name in plans:
        raise UsageError(f"{flag}: there are two plans called {name!r}", hint="--plan NAME=FILE gives each a name")
    plans[name] = plan
    return name
