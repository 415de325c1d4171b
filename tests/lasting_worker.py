"""A vision worker that several apps use after each other."""

from typing import Any

from server.vision.worker import VisionWorker


class Lasting(VisionWorker):
    """Started once, not stopped with each app."""

    def start(self, on_loaded: Any = None) -> None:
        if not self.thread.is_alive():
            super().start()
        while not self.models:
            assert self.thread.is_alive(), self.failure
        on_loaded(None)

    def stop(self) -> None:
        pass
