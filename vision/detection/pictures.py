"""What a detector found, drawn: pictures with true and found boxes, and precision against recall."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from vision.detection.detections import Detections
from vision.detection.evaluate import Curve, Truth
from vision.images import LabelledBox, draw_boxes

# Told apart also by readers who do not see red and green apart (Okabe and Ito).
PALETTE = ("#0072B2", "#E69F00", "#CC79A7", "#009E73", "#56B4E9", "#D55E00", "#F0E442")
TRUE_COLOUR = "#FFFFFF"


def draw_comparison(
    image: Image.Image, detections: Detections, truth: Truth, class_names: Sequence[str], min_score: float = 0.5
) -> Image.Image:
    """The true boxes of an RGB image, white, on the left; what was found with at least ``min_score`` on the right."""
    left = image.copy()
    pen = ImageDraw.Draw(left)
    for box, class_id in zip(truth.boxes.tolist(), truth.class_ids.tolist(), strict=True):
        pen.rectangle(box, outline=TRUE_COLOUR, width=max(1, round(max(left.size) / 320)))
        pen.text((box[0] + 2, box[1] + 2), class_names[class_id], fill=TRUE_COLOUR)
    kept = detections.scores >= min_score
    rows = zip(
        detections.boxes[kept].tolist(), detections.scores[kept].tolist(), detections.class_ids[kept].tolist(),
        strict=True,
    )  # fmt: skip
    found = [LabelledBox(tuple(box), f"{class_names[class_id]} {score:.2f}", class_id) for box, score, class_id in rows]
    both = Image.new("RGB", (2 * left.width, left.height))
    both.paste(left, (0, 0))
    both.paste(draw_boxes(image, found), (left.width, 0))
    return both


def plot_curves(curves: Mapping[str, Curve], file: Path) -> None:
    """Precision against recall of every class, with its area; classes without boxes are left out."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for place, (name, curve) in enumerate(curves.items()):
        if curve.num_boxes:
            label = f"{name} {curve.area():.3f} ({curve.num_boxes})"
            axis.plot(curve.recall, curve.precision, label=label, color=PALETTE[place % len(PALETTE)])
    axis.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    axis.grid(alpha=0.3)
    axis.legend(title="area under the curve (boxes)")
    figure.savefig(file, dpi=110)
