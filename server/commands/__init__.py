"""The commands behind ``dovetail``: one file each, imported by ``server.cli`` and free of torch at import."""
