"""A scorer's training: labels kept, people apart, resumed bit for bit, distilled from a wider one."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn_faces import drawn_face, write_colour_recogniser, write_london
from safetensors.torch import load_file

import vision
from kernels.training import RecipeError, callbacks, load_recipe
from kernels.training.study import expand
from vision.data.labelled_faces import BalancedSampler, FaceAugmentation, jitter
from vision.data.sources import DataError
from vision.face_quality import TinyFQNet, labelling
from vision.face_quality.checkpoint import ScorerConfig, load_scorer, save_scorer
from vision.tasks.distillation import DistillationRecipe
from vision.tasks.face_quality import (
    DEFAULT_SCALE,
    FaceQualityRecipe,
    FaceQualityTask,
    ScorerTaskOptions,
    ScorerTeacherOptions,
    fit_scale,
    train_face_quality,
)

RECIPES = sorted((Path(vision.__file__).parent / "recipes" / "faces").glob("*.toml"))

pytestmark = pytest.mark.skipif(find_spec("onnxruntime") is None, reason="not installed (extra vision): onnxruntime")


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faces")
    write_london(folder / "london", ("001", "002", "003", "115", "116"))
    return folder / "london", write_colour_recogniser(folder / "colours.onnx")


@pytest.fixture
def make_recipe(material, tmp_path, monkeypatch):
    monkeypatch.setattr(callbacks, "plot", lambda *_: None)
    root, recogniser = material

    def recipe(output="run", **changes):
        tables = {
            "recogniser": {"path": str(recogniser)},
            "data": {"kind": "london_faces", "root": str(root), "copies": 8},
            "labels": {"min_raw": -1.0},
            "training": {
                "output": str(tmp_path / output), "steps": 4, "batch_size": 16, "log_every": 2, "save_every": 2,
                "evaluate_every": 100, "threads": 1,
            },
        }  # fmt: skip
        for table, values in changes.items():
            tables[table] = tables.get(table, {}) | values
        return tables

    return recipe


def test_train_saves_a_scorer_with_its_meaning(make_recipe, tmp_path):
    report = train_face_quality(make_recipe(model={"licence": "MIT", "description": "discs"}))
    assert report.finished and {"spearman", "mae", "regression"} <= report.final.keys()
    assert (report.final["train_images"], report.final["skipped_images"]) == (54, 0)
    _, config = load_scorer(tmp_path / "run" / "model")
    assert (config.licence, config.labels["recogniser"], config.labels["reweightings"]) == ("MIT", "colours", 1)
    assert report.checkpoint == str(tmp_path / "run" / "model")


def test_the_recogniser_is_asked_once_for_a_face(make_recipe, tmp_path, monkeypatch):
    asked = []
    embed_faces = labelling.embed_faces
    monkeypatch.setattr(labelling, "embed_faces", lambda *call: asked.append(len(call[0].labels)) or embed_faces(*call))
    train_face_quality(make_recipe())
    assert asked == [54, 36]
    train_face_quality(make_recipe(), resume=True)
    assert asked == [54, 36], "neither split is judged twice"
    kept = sorted((tmp_path / "run").glob("features_*.safetensors"), key=lambda file: file.stat().st_size)
    assert [load_file(file)["features"].shape for file in kept] == [(36, 192), (54, 192)]
    assert labelling.read_features(kept[0], {"recogniser": "another"}) is None


def test_a_resumed_run_ends_with_the_same_weights(make_recipe, tmp_path):
    def weights(output):
        return load_file(tmp_path / output / "model" / "model.safetensors")

    train_face_quality(make_recipe("whole", task={"ema_decay": 0.9}))
    halves = make_recipe("halves", task={"ema_decay": 0.9})
    train_face_quality(halves)
    for name in ("checkpoint-4", "model"):
        for file in (tmp_path / "halves" / name).iterdir():
            file.unlink()
        (tmp_path / "halves" / name).rmdir()
    report = train_face_quality(halves, resume=True)
    assert report.finished
    for name, tensor in weights("whole").items():
        assert torch.equal(tensor, weights("halves")[name]), name


def test_a_wider_teacher_is_learned_from(make_recipe, tmp_path):
    save_scorer(TinyFQNet(2), ScorerConfig(width=2), tmp_path / "wide")
    report = train_face_quality(make_recipe(teacher={"path": str(tmp_path / "wide"), "weight": 0.5}))
    assert report.final["distillation"] >= 0
    assert load_scorer(tmp_path / "run" / "model")[0].width == 1
    assert not any("teacher" in key for key in load_file(tmp_path / "run" / "checkpoint-4" / "model.safetensors"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"kind": "oil paintings"}}, "allowed are"),
        ({"data": {"copies": 0}}, "copies"),
        ({"data": {"eval_split": "1-2"}}, "both splits"),
        ({"data": {"folds": 2}}, "at least 3"),
        ({"data": {"folds": 5, "train_split": "1-2"}}, "take the place of both splits"),
        ({"data": {"train_split": "100-140"}}, "begin at 130"),
        ({"task": {"loss": "hinge"}}, "smooth_l1"),
        ({"task": {"ema_decay": 1.0}}, "between 0 and 1"),
        ({"labels": {"reweightings": -1}}, "reweightings"),
        ({"labels": {"min_images": 99}}, "people need 99 images"),
        ({"augmentation": {"scale": 0.7}}, "scale"),
        ({"recogniser": {"channel_order": "grb"}}, "rgb"),
        ({"recogniser": {"path": "nowhere"}}, "no recognition network"),
        ({"surprise": {}}, "unknown tables"),
    ],
)
def test_recipes_that_cannot_be_trained_say_why(make_recipe, changes, message):
    with pytest.raises((RecipeError, DataError, ValueError), match=message):
        train_face_quality(make_recipe(**changes))


def batch(count=12):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, 32, 32), generator=generator).byte()
    return {"images": images, "labels": torch.linspace(0, 1, count)}


@pytest.mark.parametrize("loss", ["smooth_l1", "mse", "bce"])
def test_every_loss_learns_a_batch_by_heart(loss):
    torch.manual_seed(0)
    task = FaceQualityTask(TinyFQNet(), ScorerTaskOptions(loss, ranking_weight=0.5), None)
    optimizer = torch.optim.AdamW(task.parameters(), lr=5e-3)
    first = task(**batch())
    for _ in range(40):
        optimizer.zero_grad()
        last = task(**batch())
        last["loss"].backward()
        optimizer.step()
    assert last["mae"] < 0.5 * first["mae"]
    assert last["ranking"] < first["ranking"]


def test_the_ranking_term_is_the_hinge_over_pairs():
    task = FaceQualityTask(TinyFQNet(), ScorerTaskOptions(ranking_margin=0.1), None)
    scores, labels = torch.tensor([0.5, 0.45, 0.9]), torch.tensor([0.2, 0.8, 0.8])
    pairs = [(0, 1), (0, 2)]
    expected = np.mean([max(0.0, 0.1 - float(scores[b] - scores[a])) for a, b in pairs])
    assert float(task.ranking(scores, labels)) == pytest.approx(expected)
    assert float(task.ranking(scores, torch.ones(3))) == 0


def test_the_distillation_term_vanishes_where_student_and_teacher_agree(tmp_path):
    student = TinyFQNet().eval()
    save_scorer(student, ScorerConfig(), tmp_path)
    task = FaceQualityTask(student, ScorerTaskOptions(), ScorerTeacherOptions(str(tmp_path)))
    task.train()
    task.model.eval()
    assert task(**batch())["distillation"].item() == pytest.approx(0.0, abs=1e-6)
    torch.nn.init.constant_(student.head.bias, 2.0)
    assert task(**batch())["distillation"].item() > 0.05


def test_batches_draw_rare_labels_more_often():
    labels = torch.cat([torch.full((900,), 0.75), torch.full((100,), 0.15)])
    sampler = BalancedSampler(labels, 64, power=1.0, max_oversampling=10.0, seed=3)
    drawn = [index for indices in sampler for index in indices]
    assert len(drawn) == 1000 and len(sampler) == 16
    assert 400 < sum(index >= 900 for index in drawn) < 600
    assert drawn == [index for indices in sampler for index in indices]
    sampler.set_epoch(1)
    assert drawn != [index for indices in sampler for index in indices]


def test_jitter_keeps_the_size_and_moves_a_little():
    face = drawn_face().resize((112, 112))
    still = jitter(face, FaceAugmentation(False, 0, 0, 0), np.random.default_rng(0))
    assert np.abs(np.asarray(still).astype(int) - np.asarray(face)).max() <= 1
    moved = jitter(face, FaceAugmentation(), np.random.default_rng(1))
    assert moved.size == face.size and moved.tobytes() != face.tobytes()


def test_the_scale_puts_good_faces_at_75_and_poor_ones_at_25(caplog):
    scores = np.array([0.8, 0.82, 0.84, 0.5, 0.3, 0.4])
    severities = np.array([0.0, 0.0, 0.0, 0.2, 0.7, 0.9])
    scale = fit_scale(scores, severities)
    assert (scale.quality(0.82), scale.quality(0.35)) == (75, 25)
    assert fit_scale(-scores, severities) == DEFAULT_SCALE
    assert "does not tell" in caplog.text


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_the_committed_recipes_parse(file):
    recipe = load_recipe(file)
    for tables in [cell.recipe for cell in expand(recipe)] if "study" in recipe else [recipe]:
        parse = FaceQualityRecipe.parse if "recogniser" in tables else DistillationRecipe.parse
        parse(tables)
        assert tables["training"]["output"].startswith("runs/")
