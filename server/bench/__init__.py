"""The measurements behind ``dovetail bench`` and ``dovetail doctor``."""
