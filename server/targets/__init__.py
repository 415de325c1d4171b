"""Targets: the models whose distribution is served."""
