"""``dovetail eval``: measure a trained model; the last line printed is the report as JSON."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from server.commands.evaluate_drafter import evaluate_drafter
from server.commands.evaluate_drafter_study import evaluate_drafter_study
from server.commands.evaluate_lossless import evaluate_lossless
from server.commands.evaluate_structured import evaluate_structured
from server.commands.options import Target, Threads

app = typer.Typer(no_args_is_help=True, help="Measure a trained model.")

Images = Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Folder of images.")]
Kind = Annotated[str, typer.Option(help="How the data lie: folder, cifar10, cifar100 or idx.")]
Split = Annotated[str, typer.Option(help="Split to measure on.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images at a time.")]
StudyRecipe = Annotated[
    Path, typer.Argument(exists=True, dir_okay=False, help="TOML recipe with [[study.comparisons]].")
]
StudyFolder = Annotated[
    Path | None, typer.Option(help="Folder of the study, instead of the recipe's.", show_default=False)
]
ChannelOrder = Annotated[str, typer.Option(help="Of an .onnx recogniser: rgb or bgr.")]
Mean = Annotated[float, typer.Option(help="Of an .onnx recogniser, on 0 to 255.")]
Std = Annotated[float, typer.Option(help="Of an .onnx recogniser, on 0 to 255.")]


app.command("drafter")(evaluate_drafter)
app.command("drafter-study")(evaluate_drafter_study)
app.command("lossless")(evaluate_lossless)
app.command("structured")(evaluate_structured)


@app.command("classifier")
def evaluate_classifier(
    checkpoint: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Folder of a trained classifier.")],
    data: Images,
    kind: Kind = "folder",
    split: Split = "val",
    batch_size: BatchSize = 64,
) -> None:
    """Top-1 and top-5 accuracy of a classifier."""
    from vision.measure.classification import evaluate_classifier

    report = evaluate_classifier(checkpoint, kind, data, split, batch_size=batch_size)
    typer.echo(json.dumps(dataclasses.asdict(report)))


@app.command("retrieval")
def evaluate_retrieval(
    checkpoint: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Folder of a trained backbone.")],
    data: Images,
    kind: Kind = "folder",
    split: Split = "val",
    batch_size: BatchSize = 64,
) -> None:
    """Rank-1 and mean average precision of a backbone's embeddings, on classes it need not know."""
    from vision.measure.retrieval import evaluate_retrieval

    report = evaluate_retrieval(checkpoint, kind, data, split, batch_size=batch_size)
    typer.echo(json.dumps(dataclasses.asdict(report)))


@app.command("classifier-study")
def evaluate_classifier_study(
    recipe: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="TOML recipe with [study].")],
    json_file: Annotated[Path, typer.Option("--json", dir_okay=False, help="Report; the plot lies beside it.")],
    output: Annotated[
        Path | None, typer.Option(help="Folder of the study, instead of the recipe's.", show_default=False)
    ] = None,
) -> None:
    """Accuracy of a study's classifiers against their size and latency; what is not trained yet is marked NOT RUN."""
    from kernels.training.options import load_recipe
    from kernels.training.study import expand
    from server.placement.machine import measure_machine
    from vision.tasks.study import markdown, study_rows, write_study

    cells = expand(load_recipe(recipe), output)
    report = write_study(study_rows(cells), cells, measure_machine().json(), json_file)
    typer.echo(markdown(report["rows"]), err=True)
    typer.echo(json.dumps(report))


@app.command("perplexity")
def evaluate_perplexity(
    text: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="Text file the model was not trained on.")],
    target: Target = None,
    weights: Annotated[
        str, typer.Option(help="Formats, by commas; the first is what the others are compared with.")
    ] = "bf16,int8,int4",
    window: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 256,
    stride: Annotated[int, typer.Option(min=1, help="Tokens from one window to the next.")] = 128,
    limit: Annotated[int | None, typer.Option(min=2, help="Tokens of the text to take.", show_default=False)] = None,
    threads: Threads = None,
) -> None:
    """Perplexity of a text under a target, and its change with the weights' format.

    A packed folder has one format: name it alone, as in --weights int4. `stored` is a model's own, such as a
    GGUF file's codes; `llama.cpp` is a GGUF file as llama.cpp computes it.
    """
    from server.bench.perplexity import Windows, compare_weights
    from server.launch import load_codec, resolve_target
    from server.settings import LLAMA_CPP, NATIVE
    from server.targets.loading import load_target

    path = resolve_target(target)
    token_ids = load_codec(path).encode(text.read_text(encoding="utf-8"))[:limit]

    def load(name: str, capacity: int) -> Any:
        if name == LLAMA_CPP:
            return load_target(path, None, 1, capacity, threads, engine=LLAMA_CPP)
        return load_target(path, None if name == "stored" else name, 1, capacity, threads, engine=NATIVE)

    found = compare_weights(token_ids, weights.split(","), Windows(window, stride), load)
    results = [
        dataclasses.asdict(each) | {"change": round(each.perplexity / found[0].perplexity - 1, 5)} for each in found
    ]
    head = {"target": path.name, "text": text.name, "tokens": len(token_ids), "window": window, "stride": stride}
    typer.echo(json.dumps(head | {"results": results}))


@app.command("detector")
def evaluate_detector(
    checkpoint: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Folder of a trained detector.")],
    data: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Folder of images and annotations.")],
    kind: Annotated[str, typer.Option(help="How the data lie: voc, coco or yolo.")] = "voc",
    split: Split = "test",
    output: Annotated[
        Path | None, typer.Option(help="Folder for report, curves and pictures.", show_default=False)
    ] = None,
    batch_size: BatchSize = 8,
    classes: Annotated[
        str | None, typer.Option(help="Count these alone, parted by commas; nothing: all.", show_default=False)
    ] = None,
) -> None:
    """Average precision of a detector, overall, by class and by size, and what it takes for what."""
    from vision.detection.report import evaluate_detector, markdown

    wanted = [name.strip() for name in classes.split(",")] if classes else []
    report = evaluate_detector(checkpoint, kind, data, split, output=output, batch_size=batch_size, classes=wanted)
    typer.echo(markdown(report), err=True)
    typer.echo(json.dumps(dataclasses.asdict(report)))


@app.command("detector-study")
def evaluate_detector_study(
    recipe: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="TOML recipe with [study].")],
    json_file: Annotated[Path, typer.Option("--json", dir_okay=False, help="Report; the plot lies beside it.")],
    output: Annotated[
        Path | None, typer.Option(help="Folder of the study, instead of the recipe's.", show_default=False)
    ] = None,
    only: Annotated[str, typer.Option(help="Variants to measure, by commas; empty: all.", show_default=False)] = "",
) -> None:
    """Mean average precision of a study's detectors over their seeds; what is not trained yet is marked NOT RUN.

    Every finished cell is measured once on the recipe's evaluation split, with curves and pictures in its folder.
    """
    from kernels.training.options import load_recipe
    from kernels.training.study import choose, expand
    from vision.tasks.detection_study import markdown, study_rows, write_study

    cells = choose(expand(load_recipe(recipe), output), [name for name in only.split(",") if name])
    report = write_study(study_rows(cells), cells, json_file)
    typer.echo(markdown(report["rows"]), err=True)
    typer.echo(json.dumps(report))


@app.command("study")
def evaluate_study(
    recipe: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="TOML recipe with [study].")],
    figures: Annotated[str, typer.Option(help="Figures of the trainings' reports, by commas; the first one counts.")],
    json_file: Annotated[Path, typer.Option("--json", dir_okay=False, help="Report; the plot lies beside it.")],
    baseline: Annotated[
        str | None, typer.Option(help="Variant that gains are taken over, seed by seed.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the study, instead of the recipe's.", show_default=False)
    ] = None,
    only: Annotated[str, typer.Option(help="Variants to report, by commas; empty: all.", show_default=False)] = "",
) -> None:
    """Figures of any study over its seeds, as its trainings reported them; what is not trained is marked NOT RUN."""
    from kernels.training.options import load_recipe
    from kernels.training.study import choose, expand
    from kernels.training.study_report import markdown, study_rows, write_study

    cells = choose(expand(load_recipe(recipe), output), [name for name in only.split(",") if name])
    rows = study_rows(cells, [name for name in figures.split(",") if name], baseline)
    report = write_study(rows, cells, baseline, json_file)
    typer.echo(markdown(report), err=True)
    typer.echo(json.dumps(report))


@app.command("paired-study")
def evaluate_paired_study(
    recipe: StudyRecipe,
    json_file: Annotated[Path, typer.Option("--json", dir_okay=False, help="Report; the plot lies beside it.")],
    output: StudyFolder = None,
) -> None:
    """Verdicts of a finished study: mean gain over paired seeds with its 95 % interval, or why there is none.

    Every training that a comparison rests on must be finished; a missing or diverged one ends the command.
    """
    from kernels.training.options import load_recipe
    from kernels.training.paired_report import analyse, markdown, write_paired
    from kernels.training.study import expand

    tables = load_recipe(recipe)
    study = analyse(tables, expand(tables, output))
    report = write_paired(
        study, f"dovetail eval paired-study {recipe.as_posix()} --json {json_file.as_posix()}", json_file
    )
    typer.echo(markdown(report), err=True)
    typer.echo(json.dumps(report))


@app.command("face-quality-study")
def evaluate_face_quality_study(
    recipe: StudyRecipe,
    judge: Annotated[Path, typer.Argument(exists=True, help="Whose errors: a recognition network, not the labels'.")],
    json_file: Annotated[Path, typer.Option("--json", help="Report; plots are drawn beside it.", show_default=False)],
    fmr: Annotated[float, typer.Option(min=0, max=1, help="False match rate that sets the threshold.")] = 1e-2,
    channel_order: ChannelOrder = "rgb",
    mean: Mean = 127.5,
    std: Std = 127.5,
    output: StudyFolder = None,
) -> None:
    """Verdicts of a study of face-quality scorers on folds of people, each measured on the people it has not seen."""
    from kernels.training.options import load_recipe
    from kernels.training.paired_report import markdown
    from kernels.training.study import expand
    from vision.face_quality.recognition import RecogniserOptions, load_recogniser
    from vision.tasks.face_quality_study import evaluate_folds

    tables = load_recipe(recipe)
    network = load_recogniser(RecogniserOptions(str(judge), mean, std, channel_order))
    command = (
        f"dovetail eval face-quality-study {recipe.as_posix()} {judge.as_posix()} --fmr {fmr:g} "
        f"--channel-order {channel_order} --mean {mean:g} --std {std:g} --json {json_file.as_posix()}"
    )
    report = evaluate_folds(tables, expand(tables, output), network, fmr, command, json_file)
    typer.echo(markdown(report), err=True)
    typer.echo(json.dumps(report))


@app.command("face-quality")
def evaluate_face_quality(
    checkpoint: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Folder of a trained scorer.")],
    data: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Folder of faces of known people.")],
    recogniser: Annotated[Path, typer.Option(exists=True, help="Whose errors: a trained embedding, or an .onnx file.")],
    kind: Annotated[str, typer.Option(help="How the data lie: london_faces, orl_faces or folder.")] = "london_faces",
    split: Split = "withheld",
    copies: Annotated[int, typer.Option(min=0, help="Degraded copies of each photograph.")] = 7,
    fmr: Annotated[float, typer.Option(min=0, max=1, help="False match rate that sets the threshold.")] = 1e-2,
    rederive: Annotated[
        bool,
        typer.Option("--rederive", help="Derive the threshold anew at every discard, as some published code does."),
    ] = False,
    pristine_split: Annotated[
        str | None, typer.Option(help="Split that the naturalness baseline is fitted to.", show_default=False)
    ] = None,
    channel_order: ChannelOrder = "rgb",
    mean: Mean = 127.5,
    std: Std = 127.5,
    output: Annotated[Path | None, typer.Option(help="Folder for report and plots.", show_default=False)] = None,
) -> None:
    """How well a face-quality scorer predicts recognition errors, beside scores that need no training."""
    from vision.face_quality.recognition import RecogniserOptions
    from vision.face_quality.report import EvaluationOptions, evaluate_face_quality, report_json
    from vision.face_quality.tables import markdown

    report = evaluate_face_quality(
        checkpoint,
        RecogniserOptions(str(recogniser), mean, std, channel_order),
        EvaluationOptions(
            kind,
            data,
            split,
            copies,
            fmr,
            "re-derived threshold" if rederive else "fixed threshold",
            pristine_split,
        ),
        output,
    )
    typer.echo(markdown(report), err=True)
    typer.echo(json.dumps(report_json(report)))
