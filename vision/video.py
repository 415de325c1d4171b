"""Video files as pictures, and what is found on them followed from frame to frame. No torch here.

PyAV decodes; ByteTrack (Zhang et al., arXiv 2110.06864), in the library ``trackers``, follows. Both come with the extra
``video`` and are imported where they are used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vision.images import ImageError, Picture

SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
INSTALL = "pip install 'dovetail-server[video]'"
# From this score on a box begins a track; a weaker one may go on with one.
SURE_SCORE = 0.5
USUAL_RATE = 30.0


class VideoError(ImageError):
    """A video that cannot be read, or not here."""

    def __init__(self, message: str) -> None:
        super().__init__("invalid_video", message)


@dataclass(frozen=True)
class Frame:
    """One picture of a video: its number from 0, its second, and the frames in a second of the video."""

    number: int
    time_s: float
    rate: float
    picture: Picture


def read_frames(file: Path, step: int = 1) -> Iterator[Frame]:
    """Every ``step``-th frame of a file's first video stream, upright, in RGB.

    Errors: VideoError where PyAV is missing, and where the file holds no video or is damaged: frames before the damage
    have been given by then.
    """
    if find_spec("av") is None:
        raise VideoError(f"video files need PyAV: {INSTALL}")
    import av

    try:
        with av.open(str(file)) as container:
            if not container.streams.video:
                raise VideoError("the file holds no video")
            stream = container.streams.video[0]
            rate = float(stream.average_rate or USUAL_RATE)
            for number, frame in enumerate(container.decode(stream)):
                if number % step == 0:
                    image = frame.to_image()
                    image = image.rotate(frame.rotation, expand=True) if frame.rotation else image
                    time_s = number / rate if frame.time is None else frame.time
                    yield Frame(number, round(time_s, 3), rate, Picture(image, *image.size))
    except av.FFmpegError as error:
        raise VideoError(f"the video cannot be read: {error.strerror}") from error


class Tracks:
    """Numbers for things that are found on frame after frame; each class is followed by itself."""

    def __init__(self, rate: float) -> None:
        if find_spec("trackers") is None:
            raise VideoError(f"following what is found needs the package trackers: {INSTALL}")
        self.rate = rate
        self.by_class: dict[int, Any] = {}
        self.numbers: dict[tuple[int, int], int] = {}

    def follow(self, records: Sequence[dict[str, Any]]) -> None:
        """Give every record of the next frame (``box``, ``score``, ``class_id`` if there are classes) a ``track_id``.

        It counts from 1, and is None on the first frame that shows a thing and for what is too unsure to be followed.
        """
        classes = {record.get("class_id", 0) for record in records}
        for class_id in sorted(classes | set(self.by_class)):
            own = [record for record in records if record.get("class_id", 0) == class_id]
            for record, track in zip(own, self.tracked(class_id, own), strict=True):
                record["track_id"] = None if track < 0 else self.number(class_id, track)

    def tracked(self, class_id: int, records: Sequence[dict[str, Any]]) -> list[int]:
        """The tracker's own number of every record, -1 for none."""
        import numpy as np
        from supervision import Detections
        from trackers import ByteTrackTracker

        if class_id not in self.by_class:
            self.by_class[class_id] = ByteTrackTracker(
                frame_rate=self.rate, track_activation_threshold=SURE_SCORE, high_conf_det_threshold=SURE_SCORE,
                minimum_consecutive_frames=1,
            )  # fmt: skip
        boxes = np.array([record["box"] for record in records], dtype=np.float32).reshape(-1, 4)
        scores = np.array([record["score"] for record in records], dtype=np.float32)
        rows = np.arange(len(records))
        found = self.by_class[class_id].update(Detections(xyxy=boxes, confidence=scores, data={"row": rows}))
        tracks = np.full(len(records), -1)
        if len(found):
            tracks[found.data["row"]] = found.tracker_id
        own: list[int] = tracks.tolist()
        return own

    def number(self, class_id: int, track: int) -> int:
        """Numbers over all classes, in the order things appear."""
        return self.numbers.setdefault((class_id, track), len(self.numbers) + 1)
