"""One file a kind of model; each holds a ``KIND``, found by ``vision.serving.registry``."""
