"""From settings to a loaded model: target, drafter, codec and the engine around them. torch is imported when called."""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.engine.request import SamplingParams
from server.heaps import uncollected
from server.installation import own_version
from server.own_models import (
    ASSETS,
    GGUF_SUFFIX,
    TINY,
    OwnModelError,
    default_target,
    face_detector,
    is_gguf,
    own_drafter,
)
from server.sampling_defaults import read_sampling_defaults
from server.settings import NATIVE, NO_VISION
from server.text import TextCodec

if TYPE_CHECKING:
    from torch import Tensor

    from drafters.drafter import Drafter
    from drafters.proposal import Budget
    from server.engine.engine import Engine
    from server.engine.thread import EngineThread
    from server.placement.devices import Placement
    from server.placement.serving import Placed
    from server.settings import Settings
    from server.targets.context import DrafterRoom
    from server.targets.target import Target, TargetInfo
    from server.vision.worker import VisionWorker

logger = logging.getLogger(__name__)

HUB_FILES = ["*.safetensors", "*.json", "*.jinja"]
BUNDLED_DRAFTER = "bundled"


class LaunchError(ValueError):
    """A model named on the command line cannot be found or does not fit the others."""


@dataclass(frozen=True)
class LoadedModel:
    """Everything a server needs to answer for one model; ``placement`` says where its parts are now."""

    name: str
    created: int
    engine: EngineThread
    codec: TextCodec
    info: TargetInfo
    sampling: SamplingParams
    drafter_name: str
    context_length: int
    placement: Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class LoadedDrafters:
    """A target and, by the names they were asked for, drafters to compare on it."""

    target: Target
    drafters: dict[str, Drafter]
    codec: TextCodec
    context_length: int


def resolve_target(name: str | None) -> Path:
    """Where a target lies: None is the default model, ``tiny`` the pair for tests, else as ``resolve_model``."""
    if name == TINY:
        return ASSETS / "target"
    if name is not None:
        return resolve_model(name)
    try:
        return default_target()
    except OwnModelError as error:
        raise LaunchError(str(error)) from error


def resolve_model(name: str) -> Path:
    """A folder, a GGUF file or a hub id (fetched)."""
    path = Path(name).expanduser()
    if path.is_dir() or is_gguf(path):
        return path
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith(GGUF_SUFFIX):
        raise LaunchError(f"{name!r} is neither a folder, nor a {GGUF_SUFFIX} file, nor a hub id (owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except (RepositoryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise LaunchError(f"{name!r} is no local folder, and the hub did not give it: {error}") from error


def load_codec(path: Path) -> TextCodec:
    """The codec of a model's folder or GGUF file. Errors: TextError, TargetError."""
    if not is_gguf(path):
        return TextCodec.from_folder(path)
    from server.targets.gguf.tokenizer import read_codec

    return read_codec(path)


def load_drafter(
    target: Target, target_folder: Path, name: str | None, place: Placement, room: DrafterRoom,
    head_rows: int | None = None,
) -> Drafter | None:  # fmt: skip
    """A drafter by name, checked against the target; ``head_rows`` trims what it may draft to the first tokens.

    ``none``: no drafter; ``ngram``: prompt lookup as a drafter of its own, to compare with; otherwise a folder or hub
    id of a trained drafter or of a causal language model (None: the bundled drafter). Errors: DrafterError,
    LaunchError.
    """
    from drafters.ngram import NGramDrafter
    from server.placement.devices import on_cpu
    from server.placement.moving_drafter import MovingDrafter

    if name == "none":
        return None
    if name == "ngram":
        return NGramDrafter()
    if name is not None and name.split(":")[0] == "hybrid":
        raise LaunchError(
            f"{name!r} is no drafter any more: lookup joins the trees of every drafter (--no-lookup switches it off); "
            "name the drafter alone"
        )
    folder = own_drafter(target_folder) if name is None else resolve_model(name)
    if folder is None:
        raise LaunchError(f"{target.info.name} has no drafter of its own here; name one, or use ngram")

    def make(place: Placement) -> Drafter:
        return load_drafter_folder(target, target_folder, folder, place, room, head_rows)

    drafter = make(place) if place.device.type == "cpu" else MovingDrafter(make, place, on_cpu())
    missing = set(drafter.feature_layers) - set(target.info.feature_layers)
    if missing:
        raise LaunchError(
            f"the drafter needs the target's features {', '.join(sorted(missing))}; {target.info.name} gives "
            f"{', '.join(target.info.feature_layers)}"
        )
    target.select_features(drafter.feature_layers or ("last",))
    return drafter


def load_drafter_folder(
    target: Target, target_folder: Path, folder: Path, place: Placement, room: DrafterRoom, head_rows: int | None
) -> Drafter:
    """A folder of a trained drafter or of a causal language model; its config.json says which.

    Errors: DrafterError, also for one that does not fit into what is left of the memory.
    """
    from drafters.checkpoint import NETWORKS, read_fields
    from drafters.dovetail import load_drafter as load_dovetail
    from drafters.native import NotNative, load_native
    from server.language_drafter import check_vocabulary, load_language_drafter
    from server.targets.loading import model_config

    fields = model_config(folder).get_text_config().to_dict() if is_gguf(folder) else read_fields(folder)
    room.check(folder, fields, place.device)
    num_slots, capacity = room.num_slots, room.capacity
    if is_gguf(folder) or fields.get("model_type") not in NETWORKS:
        own, wanted = (load_codec(path).tokenizer.get_vocab(with_added_tokens=True) for path in (folder, target_folder))
        check_vocabulary(own, wanted, folder.name, target_folder.name)
        return load_language_drafter(folder, target.info.vocab_size, place, num_slots, capacity)
    embedding, lm_head = target.embedding(), head_at(target, place)
    if place.native:
        try:
            return load_native(folder, embedding, lm_head, num_slots, capacity)
        except NotNative as reason:
            logger.info("%s drafts on torch's own kernels: %s", folder.name, reason)
    return load_dovetail(folder, embedding, lm_head, place.device, place.dtype, num_slots, capacity, head_rows)


def head_at(target: Target, place: Placement) -> Tensor:
    """The target's LM head for a drafter: the one that lies at its place already, where one does."""
    from server.targets.split_target import SplitTarget

    shared = target.head_at(place) if isinstance(target, SplitTarget) else None
    return target.lm_head() if shared is None else shared


def load_engine(settings: Settings) -> Engine:
    """Target, drafter and engine, as the settings say. Errors: TargetError, DrafterError, LaunchError."""
    return load_parts(settings)[0]


@uncollected()
def load_parts(settings: Settings, report: Callable[[str], None] = logger.debug) -> tuple[Engine, Placed]:
    """The same, and where its parts were placed; ``report`` is told each stage."""
    from drafters.proposal import Budget
    from server.engine.ahead import AheadDrafter, ahead_budget
    from server.engine.engine import Engine, EngineOptions
    from server.engine.measure import fixed_chunk, load_costs
    from server.targets.context import DrafterRoom, Wanted, slot_capacity
    from server.targets.loading import choose_engine, load_target, memory_plan

    folder = resolve_target(settings.target)
    engine = choose_engine(folder, settings.engine, settings.weights)
    # Up to 8 rows share every load of a weight, and a draft level costs little: trees are small, narrow and deep.
    budget = Budget(settings.rows or 8, settings.top_k or 2, 6 if settings.depth is None else settings.depth)
    wanted = Wanted(settings.context, settings.cache, budget.rows)
    memory = memory_plan(folder, wanted, settings.max_seqs, settings.kv_cache, engine)
    capacity = slot_capacity(memory.context, [budget, ahead_budget(budget)])
    drafter_name = settings.drafter
    if drafter_name is None and own_drafter(folder) is None:
        if settings.target is not None:
            how = "only looks its drafts up in the text itself" if settings.lookup else "decodes plainly"
            logger.warning("no drafter is named for %s, so it %s; --drafter names one", settings.target, how)
        drafter_name = "none"
    placed = place(settings, folder, drafter_name, capacity, budget)
    report(f"reading the weights of {folder.name}")
    target = load_target(
        folder, settings.weights, settings.max_seqs, capacity, settings.threads, settings.kv_cache, engine,
        settings.gpu_layers, placed.split if engine == NATIVE else None, placed.stream if engine == NATIVE else None,
    )  # fmt: skip
    room = DrafterRoom(settings.max_seqs, capacity, memory.pool_rows, memory.left_bytes)
    report("loading the drafter")
    drafter = load_drafter(target, folder, drafter_name, placed.drafter, room, placed.head_rows)
    options = EngineOptions(
        settings.max_seqs, memory.context, budget, lookup=settings.lookup, cache_bytes=memory.cache_bytes,
        pool_rows=memory.pool_rows, prefill_chunk=fixed_chunk(target),
    )  # fmt: skip
    report("measuring what passes cost")
    drafts = settings.trees == "cost" and (drafter is not None or settings.lookup)
    costs = load_costs(target, drafter, budget, capacity, str(placed.drafter)) if drafts else None
    if drafter is not None and drafter.feature_layers and placed.drafter.device.type != "cpu":
        drafter = AheadDrafter(drafter)
    return Engine(target, drafter, options, costs), placed


def place(settings: Settings, target: Path, drafter: str | None, capacity: int, budget: Budget) -> Placed:
    """Where drafter and layers go. Errors: LaunchError for a drafter that is nowhere."""
    from server.placement.serving import Wanted, place_parts

    if drafter in ("none", "ngram"):
        folder = None
    else:
        folder = own_drafter(target) if drafter is None else resolve_model(drafter)
    placed = place_parts(
        Wanted(
            target, settings.weights, folder, settings.drafter_device, settings.vram, settings.max_seqs, capacity,
            budget.rows, settings.threads, settings.stream_prefill,
        )
    )  # fmt: skip
    files = [] if folder is None else [folder] if folder.is_file() else list(folder.glob("*.safetensors"))
    return dataclasses.replace(placed, drafter_bytes=sum(file.stat().st_size for file in files))


@uncollected()
def load_drafters(settings: Settings, names: Sequence[str], grid: Sequence[Budget]) -> LoadedDrafters:
    """A target with one slot, and several drafters for it that may grow any of the trees in ``grid``.

    Each name is what ``--drafter`` takes; no names: the target's own drafter, where one lies here. Errors:
    TargetError, DrafterError, LaunchError.
    """
    from server.placement.devices import drafter_placement
    from server.targets.context import DrafterRoom, Wanted, slot_capacity
    from server.targets.loading import choose_engine, load_target, memory_plan

    folder = resolve_target(settings.target)
    if not names and own_drafter(folder) is None:
        raise LaunchError(f"name the drafters to measure on {folder.name}; it has none of its own here")
    engine = choose_engine(folder, settings.engine, settings.weights)
    memory = memory_plan(folder, Wanted(settings.context, 0), 1, settings.kv_cache, engine)
    capacity = slot_capacity(memory.context, grid)
    room = DrafterRoom(1, capacity, capacity, memory.left_bytes)
    target = load_target(
        folder, settings.weights, 1, capacity, settings.threads, settings.kv_cache, engine, settings.gpu_layers
    )
    drafters: dict[str, Drafter] = {}
    wanted: Sequence[str | None] = names or [None]
    for name in wanted:
        drafter = load_drafter(target, folder, name, drafter_placement(settings.drafter_device), room)
        label = name or BUNDLED_DRAFTER
        if drafter is None or label in drafters:
            raise LaunchError(f"{label!r} cannot be measured: name drafters, each once")
        drafters[label] = drafter
    return LoadedDrafters(target, drafters, load_codec(folder), memory.context)


def bundled_vision(kind: str) -> Path:
    """The bundled model of ``kind``; the face detector comes in a package. Errors: LaunchError, OwnModelError."""
    if kind == "face-detector":
        return face_detector()
    folder = ASSETS / kind.replace("-", "_")
    if not folder.is_dir():
        raise LaunchError(f"there is no bundled {kind} model; name one")
    return folder


def vision_worker(settings: Settings) -> VisionWorker | None:
    """The vision models' worker, not started: those named, else the bundled ones; None where there are none.

    Errors: LaunchError for a path without a model, and for two models of one name.
    """
    from server.vision.worker import VisionWorker, WorkerOptions
    from vision.images import ImageLimits
    from vision.serving.folder import name_of
    from vision.serving.registry import all_kinds

    named = settings.vision
    if named is None:
        bundled = [ASSETS / kind.replace("-", "_") for kind in all_kinds()]
        named = tuple(str(folder) for folder in bundled if folder.is_dir())
        if settings.no_llm and not named:
            raise LaunchError("there is no bundled vision model, so --no-llm needs --vision PATH")
    models: dict[str, Path] = {}
    for path in (Path(name).expanduser() for name in named if name != NO_VISION):
        if not path.exists() and str(path) in all_kinds():
            path = bundled_vision(str(path))
        if not path.exists():
            raise LaunchError(f"{str(path)!r} is no vision model: there is no such folder or file")
        name = name_of(path)
        if name in models or (name == settings.served_name and not settings.no_llm):
            raise LaunchError(f"two models would be served as {name!r}; rename the folder {path}")
        models[name] = path
    options = WorkerOptions(
        max_requests=settings.max_waiting,
        max_batch=settings.vision_batch,
        limits=ImageLimits(max_pixels=settings.vision_pixels),
    )
    return VisionWorker(models, options) if models else None


def load_model(settings: Settings, report: Callable[[str], None] = logger.debug) -> LoadedModel:
    """Everything one server needs for its model; the engine thread is not started yet."""
    from server.engine.thread import EngineThread
    from server.placement.whereabouts import placement_status, target_sizes

    engine, placed = load_parts(settings, report)
    folder = resolve_target(settings.target)
    sizes = target_sizes(folder, settings.weights, engine.scheduler.limits.num_rows)
    codec = load_codec(folder)
    codec.fit(engine.target.info.vocab_size)
    codec.hold_to(engine.options.context_length)
    if fault := codec.check_templates():
        logger.warning("%s; chats are refused, completions are not", fault)
    thread = EngineThread(engine, settings.max_waiting)
    if settings.cache_file is not None:
        thread.at_end = keep_prompts(engine, folder, settings.cache_file)
    by_model = settings.sampling_defaults == "model"
    drafter = engine.drafting.drafter
    return LoadedModel(
        name=settings.served_name,
        created=int(time.time()),
        engine=thread,
        codec=codec,
        info=engine.target.info,
        sampling=read_sampling_defaults(folder) if by_model else SamplingParams(),
        drafter_name="none" if drafter is None else drafter.name,
        context_length=engine.options.context_length,
        placement=functools.partial(placement_status, engine, placed, sizes),
    )


def keep_prompts(engine: Engine, folder: Path, file: Path) -> Callable[[], None]:
    """Take over the prompts that ``file`` holds for this very model; what is to be called to write it at the end."""
    from kernels.native import ABI, instruction_set
    from server.engine.cache_file import PromptFile
    from server.targets.identity import model_identity

    assert engine.prefixes is not None  # the settings refuse a file without a cache
    drafter = engine.drafting.drafter
    features = () if drafter is None else drafter.feature_layers
    computed = (type(engine.target).__name__, engine.target.info, features, instruction_set(), ABI, own_version())
    prompts = PromptFile(engine.prefixes, file.expanduser(), "|".join(map(str, (model_identity(folder), *computed))))
    prompts.load()
    return prompts.save
