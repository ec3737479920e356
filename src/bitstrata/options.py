"""The arguments of the verbs, each written once: from here come the Python functions (verbs.py), the commands
(cli/commands.py) and the reference pages.

A verb is a frozen dataclass. Its docstring's first line is the command's help, a field's `Argument` says the rest. The
order of fields is that of positional arguments in Python, until `KW_ONLY`. Nothing heavy is imported here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from .errors import UsageError
from .option_fields import Argument as Argument
from .option_fields import arguments_of as arguments_of
from .option_fields import bounds, named_values, texts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
else:
    PreTrainedModel = PreTrainedTokenizerBase = Any


Device = Annotated[str, Argument("auto, cpu, cuda or cuda:N.")]
Checkpoint = Argument("Checkpoint folder or hub id.", flag="")
Chosen = Argument("Checkpoint folder or hub id, OUT or OUT:BITS.", flag="")
Reuse = Annotated[str, Argument("Take up cached beginnings that equal bits wrote, any bits wrote, or off.")]
CacheDtype = Annotated[str, Argument("How the cache keeps keys and values: auto (the model's dtype), int8 or int4.")]


@dataclass(frozen=True, kw_only=True)
class FromHub:
    """How a hub id is fetched; a local folder needs none of it."""

    revision: Annotated[str | None, Argument("Of MODEL on the hub: a branch, tag or commit.")] = None
    token: Annotated[str | None, Argument("For the hub, where it asks for one; HF_TOKEN by default.")] = field(
        default=None, repr=False
    )
    cache_dir: Annotated[str | Path | None, Argument("Where the hub's files are kept; HF_HUB_CACHE by default.")] = None

    @property
    def hub(self) -> FromHub:
        """This part alone."""
        return FromHub(revision=self.revision, token=self.token, cache_dir=self.cache_dir)

    @property
    def other(self) -> FromHub:
        """For another repository than the model's, whose revisions are its own."""
        return FromHub(token=self.token, cache_dir=self.cache_dir)


@dataclass(frozen=True)
class QuantizeOptions(FromHub):
    """Quantize MODEL into nested bit-planes. Run the same command again to resume an interrupted job."""

    model: Annotated[str | Path | PreTrainedModel, Argument("Model folder (safetensors) or hub id.", flag="")]
    output: Annotated[str | Path, Argument("Folder to write; an unfinished job in it is resumed.", short="-o")]
    _: KW_ONLY
    bits: Annotated[str | int | Iterable[int], Argument("Bits to support, each 1 to 8: 2-4, 2,4 or 3.")] = "2-4"
    method: Annotated[str, Argument("nested, anybcq, anyprecision, bpdq, gptq, bcq or rtn.")] = "nested"
    group_size: Annotated[int, Argument("Input columns that share scales.")] = 128
    calibration: Annotated[
        str | Path | Sequence[Any] | None,
        Argument("UTF-8 file, .jsonl, .csv, stdlib, chat, or several: a.txt,chat:0.3. The final check takes it too."),
    ] = None
    num_samples: Annotated[int, Argument("Windows to calibrate on.")] = 128
    seq_len: Annotated[int, Argument("Tokens a window.")] = 2048
    time_budget: Annotated[
        str | None,
        Argument("Lower windows, then their tokens, so that it takes about so long: 30min, 2h. Measured first."),
    ] = None
    preset: Annotated[str, Argument("fast (no calibration text), default or best (slowest).")] = "default"
    head_bits: Annotated[
        int | None,
        Argument("Planes for the output head and the embedding too, 4 to 8; else they stay as they are."),
    ] = None
    options: Annotated[
        Mapping[str, Any] | None, Argument("Method option NAME=VALUE; repeatable.", flag="--option", each=named_values)
    ] = None
    skip: Annotated[str | Sequence[str], Argument("Layers to leave: a glob, or re:REGEX; repeatable.", each=texts)] = ()
    merge_adapter: Annotated[
        bool, Argument("MODEL is a LoRA adapter, or holds one: quantize what it makes of its model (extra lora).")
    ] = False
    drop_mtp: Annotated[bool, Argument("Leave out layers that predict further tokens (MTP).")] = False
    seed: Annotated[int, Argument("Decides windows and training order.")] = 0
    device: Device = "auto"
    devices: Annotated[
        str | Sequence[str] | None,
        Argument("Several GPUs, a process each: cuda:0,cuda:1. Or cpu,cpu. torchrun does without; the same result."),
    ] = None
    dtype: Annotated[
        str, Argument("Products while calibrating, and what is kept: auto (what is fast here), bfloat16, float32.")
    ] = "auto"
    push_to_hub: Annotated[str | None, Argument("Then put it on the hub, as USER/NAME (bitstrata push).")] = None
    dry_run: Annotated[bool, Argument("List all, with time, memory and disk; weights are not read.")] = False


@dataclass(frozen=True)
class PlanOptions(FromHub):
    """Choose the bits of every layer for a budget in bytes or bits a weight."""

    model: Annotated[str | Path, Checkpoint]
    budget: Annotated[Any, Argument("All weights: 600MB, 1.8GiB. Or bits read a weight: 3.2bpw.")]
    solver: Annotated[str, Argument("One of: paired (the best), milp, greedy, waterfill.")] = "paired"
    text: Annotated[
        str | Path | None, Argument("UTF-8 text to measure layers and the plan on; or stdlib. Once measured, optional.")
    ] = None
    reference: Annotated[str | Path | None, Argument("The original model; else losses are to the highest bits.")] = None
    _: KW_ONLY
    output: Annotated[str | Path | None, Argument("Where the plan is written.", short="-o")] = None
    pages: Annotated[bool, Argument("Write the universal order of pages beside the model.")] = False
    plot: Annotated[str | Path | None, Argument("Draw loss against bytes to this file (extra plots).")] = None
    sensitivity: Annotated[
        str | Path | None, Argument("Where layers' losses are kept; beside the model by default.")
    ] = None
    measure: Annotated[str | None, Argument("How layers are measured: kld (default) or hessian (quick, rough).")] = None
    together: Annotated[bool, Argument("Equal bits for q, k, v and for gate, up: they share a kernel call.")] = False
    min_bits: Annotated[
        Mapping[str, int] | None,
        Argument("At least so many bits: 3, or '*.down_proj=3'. May be repeated.", each=bounds),
    ] = None
    max_bits: Annotated[Mapping[str, int] | None, Argument("At most so many bits, likewise.", each=bounds)] = None
    windows: Annotated[int | None, Argument("Windows to measure on, and as many to compare on (default 16).")] = None
    seq_len: Annotated[int | None, Argument("Tokens a window (default 512).")] = None
    seed: Annotated[int, Argument("Which windows, and which random plan.")] = 0
    device: Device = "auto"


@dataclass(frozen=True)
class EvaluateOptions(FromHub):
    """Measure each bits on a text, on tasks, or at the decisions of chats: distance from the original and scores."""

    model: Annotated[str | Path | PreTrainedModel, Checkpoint]
    text: Annotated[
        str | Path | None,
        Argument(
            "For perplexity, kld, top-1: a UTF-8 file, <|endoftext|> between documents; chats .jsonl; stdlib, chat."
        ),
    ] = None
    bits: Annotated[
        Any, Argument("Bits and plans to measure: 2,3,plan.json. All bits by default; of one plan's pages that plan.")
    ] = None
    reference: Annotated[
        str | Path | PreTrainedModel | None, Argument("The original model, for kld and agreement.")
    ] = None
    seq_len: Annotated[int | None, Argument("Tokens a window (default 2048), at most the model's context.")] = None
    max_tokens: Annotated[int | None, Argument("Stop after so many predicted tokens.")] = None
    _: KW_ONLY
    scored: Annotated[
        str, Argument("Tokens of a window that count: all, or second-half, as llama-perplexity does (windows of 512).")
    ] = "all"
    tasks: Annotated[
        str | Sequence[str],
        Argument("Tasks of lm-eval (extra eval): names, YAML files, folders, with commas; repeatable.", each=texts),
    ] = ()
    margins: Annotated[
        str | Path | None,
        Argument("Chats: how sure each bits is where they call tools or answer in JSON. A .jsonl file, or chat."),
    ] = None
    limit: Annotated[float | None, Argument("Examples of each task; below 1 a share of them.")] = None
    num_fewshot: Annotated[int | None, Argument("Examples in front of each question of a task.")] = None
    batch_size: Annotated[int, Argument("Requests of a task computed at a time.")] = 1
    apply_chat_template: Annotated[bool, Argument("Ask tasks through the model's chat template.")] = False
    arithmetic: Annotated[
        str | None,
        Argument("exact, or int8 as in decoding on a CPU. By default what runs for windows of this length."),
    ] = None
    tokenizer: Annotated[
        PreTrainedTokenizerBase | None, Argument("Of a loaded model that has no folder.", is_command=False)
    ] = None
    device: Device = "auto"


@dataclass(frozen=True)
class ExportOptions(FromHub):
    """Write MODEL at one number of bits, or with one plan, for other programs. Nothing is written unless all is."""

    model: Annotated[str | Path, Chosen]
    output: Annotated[str | Path, Argument("File (gguf) or folder to write; it must not be there.", short="-o")]
    _: KW_ONLY
    format: Annotated[str, Argument("dense (transformers), gguf (llama.cpp) or gptq (vLLM, transformers).")]
    bits: Annotated[
        str | int | Mapping[str, int] | None, Argument("Precision, or a plan's file; the highest by default.")
    ] = None
    refit: Annotated[bool, Argument("Fit weights that the format does not hold anew, and say what is lost.")] = False
    types: Annotated[
        str | Sequence[str],
        Argument(
            "gguf: Q4_K for all layers, GLOB=Q6_K for some; repeatable. gptq: its bits.", flag="--type", each=texts
        ),
    ] = ()
    dtype: Annotated[str, Argument("dense: auto (the model's), bfloat16, float16 or float32 (exact).")] = "auto"
    text: Annotated[str | Path | None, Argument("Measure on this text how far the result is from the model.")] = None


@dataclass(frozen=True)
class ImportOptions:
    """Make a checkpoint of what another program quantized, with the same weights."""

    source: Annotated[str | Path, Argument("Its folder or .gguf file.", flag="")]
    output: Annotated[str | Path, Argument("Folder to write.", short="-o")]
    _: KW_ONLY
    refit: Annotated[bool, Argument("Round scales that fp16 does not hold, and say what is lost.")] = False


@dataclass(frozen=True)
class BenchOptions:
    """Check the kernels, then time them beside memory bandwidth and torch."""

    model: Annotated[str | Path | None, Argument("Checkpoint, OUT or OUT:BITS; or use --shapes.", flag="")] = None
    _: KW_ONLY
    shapes: Annotated[
        str | None, Argument("Instead of a checkpoint: llama-3.2-1b, llama-3.1-8b, ... or 4096x4096,14336x4096.")
    ] = None
    bits: Annotated[
        str | int | Iterable[int] | None, Argument("Precisions, such as 2,3,4; all of OUT's by default.")
    ] = None
    rows: Annotated[str | int | Iterable[int], Argument("Rows of activations for single layers.")] = "1,8"
    threads: Annotated[int | None, Argument("Threads; what torch uses by default.")] = None
    whole: Annotated[bool, Argument("With a model's name in --shapes: decode a whole model too.")] = False
    head_bits: Annotated[
        int | None, Argument("With --whole: planes for the output head and the embedding; bf16 otherwise.")
    ] = None
    blocks: Annotated[int | None, Argument("With --whole: only as many decoder blocks.")] = None
    regimes: Annotated[str | Sequence[str], Argument("cache, memory, or both.", flag="--regime")] = "both"
    rounds: Annotated[int, Argument("Rounds of which the median is taken.")] = 7
    group_size: Annotated[int, Argument("Of layers that are no checkpoint's.", is_command=False)] = 128
    kv_cache_dtype: CacheDtype = "auto"
    device: Device = "auto"
    tune: Annotated[bool, Argument("On a GPU: first search the fastest shapes of programs, and keep them.")] = False


@dataclass(frozen=True)
class InspectOptions(FromHub):
    """Show bits, bits per weight and bytes for each precision, the layers, and the kernel that will run."""

    path: Annotated[str | Path, Checkpoint]
    _: KW_ONLY
    verify: Annotated[bool, Argument("Read and check every byte.")] = False


@dataclass(frozen=True)
class PushOptions:
    """Put a checkpoint on the hub, with a card that says how it was made and measured."""

    model: Annotated[str | Path, Checkpoint]
    repo: Annotated[str, Argument("Its name there: USER/NAME.", flag="")]
    _: KW_ONLY
    private: Annotated[bool, Argument("Make a new repository private.")] = False
    revision: Annotated[str | None, Argument("The branch to write to; made where it is not there.")] = None
    token: Annotated[str | None, Argument("With which the hub lets one write; HF_TOKEN by default.")] = field(
        default=None, repr=False
    )


@dataclass(frozen=True)
class DemoOptions:
    """Quantize the bundled model once and run it at 2, 3 and 4 bits, offline, in under two minutes."""

    output: Annotated[str | Path | None, Argument("Keep the quantized model here.", short="-o")] = None


@dataclass(frozen=True)
class EnvOptions:
    """Show versions, the machine, and which kernels can run."""


@dataclass(frozen=True)
class GenerationSettings:
    """How a text is continued. Raises UsageError for numbers that cannot be used."""

    max_new_tokens: Annotated[int, Argument("The most tokens to add.")] = 64
    temperature: Annotated[float, Argument("0 is greedy; above 0 samples.")] = 0.0
    top_p: Annotated[float, Argument("Sample from the most likely tokens of this total probability.")] = 1.0
    seed: Annotated[int, Argument("Seed of the sampling.")] = 0
    draft_bits: Annotated[int | None, Argument("Draft tokens at this precision where it is lower.")] = None
    draft_tokens: Annotated[int, Argument("The most tokens drafted at a time.")] = 4
    policy: Annotated[
        str, Argument("What lowers the bits of single tokens: fixed, position:tokens=32, entropy or structure.")
    ] = "fixed"
    min_bits: Annotated[int | None, Argument("How low the policy may go; the lowest by default.")] = None

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.max_new_tokens < 1:
            raise UsageError("temperature must not be negative, top_p must lie in (0, 1], max_new_tokens be at least 1")
        if self.min_bits is not None and self.policy == "fixed":
            raise UsageError(f"min_bits={self.min_bits} needs a policy", hint="for example policy structure")


@dataclass(frozen=True, kw_only=True)
class Size(FromHub):
    """How much of a model is loaded, from where, and where to."""

    budget: Annotated[
        str | None,
        Argument("Load no more than this: 600MB for the whole model, 3.2bpw. Needs OUT's page order (bitstrata plan)."),
    ] = None
    fit: Annotated[bool, Argument("Load as much as the free memory holds beside the cache of keys and values.")] = False
    kv_cache_dtype: CacheDtype = "auto"
    adapter: Annotated[str | None, Argument("LoRA adapter to run with: a folder or hub id (extra lora).")] = None
    device: Device = "auto"


@dataclass(frozen=True, kw_only=True)
class GenerateCommand(Size, GenerationSettings):
    """Continue PROMPT at the chosen bits, streaming to the terminal."""

    model: Annotated[str, Chosen]
    prompt: Annotated[str, Argument("Text to continue.", flag="")]
    bits: Annotated[str | None, Argument("Precision, or a plan's file; the highest by default.")] = None
    json: Annotated[bool, Argument("Print one JSON object on stdout.")] = False


@dataclass(frozen=True, kw_only=True)
class ChatCommand(Size, GenerationSettings):
    """Talk to a model; its bits can change in the middle of the conversation. /help lists the commands."""

    model: Annotated[str, Chosen]
    bits: Annotated[int | None, Argument("Precision to start with; the highest by default.")] = None
    system: Annotated[str | None, Argument("Instruction before the first turn.")] = None
    max_new_tokens: Annotated[int, Argument("The longest reply, in tokens.")] = 256
    temperature: Annotated[float, Argument("0 is greedy; above 0 samples.")] = 0.7
    top_p: Annotated[float, Argument("Sample from the most likely tokens of this total probability.")] = 0.95
    reuse: Reuse = "equal"


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """What a server is told whichever model it has."""

    min_bits: Annotated[
        int | None, Argument("How low the policy may go with requests that do not say; not at all by default.")
    ] = None
    api_key: Annotated[
        str | None, Argument("Key that clients must send; none by default.", environment="BITSTRATA_API_KEY")
    ] = None
    default_max_tokens: Annotated[int, Argument("New tokens of a chat request that gives no number.", least=1)] = 512
    max_prompt_tokens: Annotated[
        int | None, Argument("The longest prompt; by default what context and cache take.", least=1)
    ] = None
    max_body: Annotated[int, Argument("The largest request, in bytes.", least=1)] = 4 * 1024 * 1024
    max_connections: Annotated[int, Argument("HTTP requests under way; more are refused.", least=1)] = 512
    strict: Annotated[bool, Argument("Refuse what is otherwise ignored or adjusted, with a warning in the reply.")] = (
        False
    )
    generation_config: Annotated[
        str, Argument("auto: requests sample as the model's generation_config.json says where they do not; or none.")
    ] = "auto"
    root_path: Annotated[str, Argument("A prefix of all paths, where a proxy serves this below one: /llm.")] = ""
    keep_alive: Annotated[int, Argument("Seconds that an idle connection stays open.", least=1)] = 75


@dataclass(frozen=True, kw_only=True)
class ServeOptions(Size, ServerSettings):
    """Serve a model over HTTP as OpenAI does, each request at its own bits. Ctrl-C ends it."""

    model: Annotated[str, Chosen]
    host: Annotated[str, Argument("Address to listen at; 0.0.0.0 is every one.")] = "127.0.0.1"
    port: Annotated[int, Argument("0 takes any that is free.", least=0, most=65535)] = 8000
    served_model_name: Annotated[str | None, Argument("The model's name; by default the folder's or hub id.")] = None
    bits: Annotated[
        str | None,
        Argument("For requests that name none: bits, a plan's NAME or file; the highest by default."),
    ] = None
    plan: Annotated[
        Sequence[str], Argument("NAME=FILE: a plan that requests choose as MODEL:NAME; repeatable.", each=texts)
    ] = ()
    policy: Annotated[
        str, Argument("What lowers bits: fixed, load:target_ms=50, position:tokens=32, entropy or structure.")
    ] = "fixed"
    max_requests: Annotated[int, Argument("Requests served at a time; others wait.", least=1)] = 16
    max_waiting: Annotated[int, Argument("Requests that may wait; more are refused.", least=1)] = 256
    cache_tokens: Annotated[int | None, Argument("Room for all running requests' tokens.", least=1)] = None
    reuse: Reuse = "equal"
    allowed_origin: Annotated[
        Sequence[str], Argument("A web page's origin that may call the server (CORS); repeatable.", each=texts)
    ] = ()
    allowed_host: Annotated[
        Sequence[str],
        Argument(
            "A name that clients reach the server by, where they use neither localhost nor its address; "
            "* is any. Repeatable.",
            each=texts,
        ),
    ] = ()
    grace: Annotated[float, Argument("Seconds for requests under way when the server closes.", least=0)] = 30.0
