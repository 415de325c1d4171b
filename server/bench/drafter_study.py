"""One run of ``dovetail eval drafter-study``: the finished cells of a study measured together, figures over seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from drafters.checkpoint import CONFIG_FILE
from drafters.train.feature_source import DataOptions
from kernels.training import TrainingOptions, take_table
from kernels.training.run import FINGERPRINT_FILE, last_checkpoint
from kernels.training.study import FINISHED, INTERRUPTED, NOT_RUN, Cell
from server.bench.texts import BenchError

DRAFTER = "drafter"
OVER_SEEDS = ("acceptance_length", "tokens_per_s", "speedup", "draft_ms_per_step", "draft_ms_per_round")
UNTRAINED = frozenset({"output", "save_every", "log_every", "evaluate_every", "keep_checkpoints", "threads"})
"""Keys of [training] that leave the weights as they are."""


@dataclass(frozen=True)
class Claim:
    """What a paper says of two variants: ``second`` has more of ``figure`` than ``first``."""

    first: str
    second: str
    figure: str
    text: str


CLAIMS = (
    Claim("linear", "dgf", "acceptance_length", "gated instead of linear fusion lengthens acceptance (Dovetail)"),
    Claim("dgf", "dgf_1", "acceptance_length", "a second block lengthens acceptance (Dovetail)"),
    Claim("dgf_1", "dgf_3", "acceptance_length", "four blocks lengthen acceptance over two (Dovetail)"),
    Claim("dgf_3", "dgf_4", "acceptance_length", "a fifth block lengthens acceptance (Dovetail)"),
    Claim("linear", "dgf", "tokens_per_s", "gated instead of linear fusion is faster (Dovetail)"),
    Claim("dgf", "dgf_1", "tokens_per_s", "a second block is faster (Dovetail)"),
    Claim("dgf_1", "dgf_3", "tokens_per_s", "four blocks are faster than two (Dovetail)"),
    Claim("dgf", "dgf_ttt", "acceptance_length", "training-time test lengthens acceptance (EAGLE-3)"),
    Claim(
        "cross_entropy", "as_shipped", "acceptance_length", "acceptance as a loss beats cross-entropy alone (DSpark)"
    ),
    Claim("teacher_forced", "as_shipped", "acceptance_length", "training-time test lengthens acceptance (EAGLE-3)"),
    Claim("as_shipped", "two_blocks", "acceptance_length", "a second block lengthens acceptance (Dovetail)"),
    Claim("as_shipped", "two_blocks", "tokens_per_s", "a second block is faster (Dovetail)"),
    Claim(
        "linear", "as_shipped", "acceptance_length", "gated instead of linear fusion lengthens acceptance (Dovetail)"
    ),
    Claim("as_shipped", "vocabulary_4096", "tokens_per_s", "half the draft vocabulary is faster (FR-Spec)"),
)


def status_of(cell: Cell) -> str:
    """Where a cell stands by what lies in its folder, whichever command trained it."""
    checkpoint = last_checkpoint(cell.output)
    if checkpoint is None:
        return NOT_RUN
    steps = take_table(cell.recipe, "training", TrainingOptions).steps
    done = int(checkpoint.name.removeprefix("checkpoint-")) >= steps
    return FINISHED if done and (cell.output / DRAFTER / CONFIG_FILE).is_file() else INTERRUPTED


def finished_folders(cells: Sequence[Cell]) -> list[str]:
    """The drafter folders of the finished cells. Errors: BenchError where there are none."""
    folders = [str(cell.output / DRAFTER) for cell in cells if status_of(cell) == FINISHED]
    if not folders:
        where = cells[0].output.parent.parent
        raise BenchError(f"no cell of the study is finished in {where}; train some with `dovetail study drafter`")
    return folders


def num_tokens(recipe: Mapping[str, Any]) -> int:
    """Positions a training reads: steps x samples x their length; at most so many where samples are conversations."""
    training = take_table(dict(recipe), "training", TrainingOptions)
    window: int = take_table(dict(recipe), "data", DataOptions).window_length
    return training.steps * training.batch_size * training.accumulation * window


def differences(cell: Cell) -> list[str]:
    """Where the recipe that ``cell`` was really trained with departs from the study's, but for what changes nothing."""
    file = cell.output / FINGERPRINT_FILE
    if not file.is_file():
        return [f"{file.name} is missing, so the recipe is not known"]
    ran, wanted = flat(json.loads(file.read_text(encoding="utf-8"))["recipe"]), flat(cell.recipe)
    return [
        f"{key} = {ran.get(key)!r} instead of {wanted.get(key)!r}"
        for key in sorted(ran.keys() | wanted.keys())
        if ran.get(key) != wanted.get(key) and key not in {f"training.{name}" for name in UNTRAINED}
    ]


def flat(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """``table.key`` -> value, as JSON holds it."""
    plain = json.loads(json.dumps(recipe))
    return {f"{table}.{key}": value for table, values in plain.items() for key, value in values.items()}


def study_report(cells: Sequence[Cell], evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """``evaluation``, as ``evaluate_drafters`` gave it for ``finished_folders(cells)``, ordered by variants and seeds.

    ``runs`` has an entry for every cell, ``variants`` the mean, the sample standard deviation and the
    values over the seeds that ran (deviation None for one seed), ``claims`` what became of the papers' statements.
    """
    measured = {entry["drafter"]: entry["settings"] for entry in evaluation["drafters"]}
    runs = []
    for cell in cells:
        settings = measured.get(str(cell.output / DRAFTER))
        run: dict[str, Any] = {"variant": cell.variant, "seed": cell.seed, "status": status_of(cell)}
        if settings is not None:
            run |= {"tokens": num_tokens(cell.recipe), "differs": differences(cell), "settings": settings}
        runs.append(run)
    variants = [variant_json(cell, runs) for cell in {cell.variant: cell for cell in cells}.values()]
    kept = {key: value for key, value in evaluation.items() if key != "drafters"}
    packed = all(cell.recipe["data"].get("tokens") is not None for cell in cells)
    return {**kept, "packed": packed, "variants": variants, "claims": judged_claims(variants), "runs": runs}


def variant_json(cell: Cell, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One variant over its seeds."""
    own = [run for run in runs if run["variant"] == cell.variant]
    ran = [run for run in own if "settings" in run]
    return {
        "variant": cell.variant,
        "fusion": cell.recipe["drafter"].get("fusion", "dgf"),
        "num_blocks": cell.recipe["drafter"].get("num_blocks", 1),
        "unrolled_steps": cell.recipe.get("loss", {}).get("unrolled_steps", 1),
        "status": FINISHED if ran else NOT_RUN,
        "seeds": [run["seed"] for run in ran],
        "seeds_not_run": [run["seed"] for run in own if "settings" not in run],
        "settings": [setting_json(several) for several in zip(*(run["settings"] for run in ran), strict=True)],
    }


def setting_json(several: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One tree size over the seeds."""
    first = several[0]
    figures: dict[str, Any] = {name: first[name] for name in ("top_k", "depth", "rows")}
    for name in OVER_SEEDS:
        figures[name] = spread([one[name] for one in several if one[name] is not None])
    figures["ece"] = spread([one["calibration"]["ece"] for one in several if one["calibration"] is not None])
    depths = max(len(one["acceptance_per_depth"]) for one in several)
    figures["acceptance_per_depth"] = [
        round(statistics.fmean(row[depth]["share"] for row in rows), 4)
        for depth in range(depths)
        if (rows := [one["acceptance_per_depth"] for one in several if len(one["acceptance_per_depth"]) > depth])
    ]
    return figures


def spread(values: Sequence[float]) -> dict[str, Any] | None:
    """Mean, sample standard deviation and the values themselves; None without values."""
    if not values:
        return None
    std = round(statistics.stdev(values), 4) if len(values) > 1 else None
    return {"mean": round(statistics.fmean(values), 4), "std": std, "values": list(values)}


def judged_claims(variants: Sequence[Mapping[str, Any]], claims: Sequence[Claim] = CLAIMS) -> list[dict[str, Any]]:
    """Each claim that both sides ran for, in the first tree size: the difference of the means, and a verdict.

    ``agrees`` or ``disagrees`` where the ranges of the seeds' values do not touch, ``within the spread`` where they do,
    ``one seed`` where one side has no spread to judge by.
    """
    settings = {one["variant"]: one["settings"][0] for one in variants if one["settings"]}
    judged = []
    for claim in claims:
        if claim.first not in settings or claim.second not in settings:
            continue
        first, second = (settings[name][claim.figure] for name in (claim.first, claim.second))
        difference = second["mean"] - first["mean"]
        if first["std"] is None or second["std"] is None:
            verdict = "one seed"
        elif max(min(first["values"]), min(second["values"])) <= min(max(first["values"]), max(second["values"])):
            verdict = "within the spread"
        else:
            verdict = "agrees" if difference > 0 else "disagrees"
        judged.append({**vars(claim), "difference": round(difference, 3), "verdict": verdict})
    return judged
