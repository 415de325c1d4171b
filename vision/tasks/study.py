"""Classifiers compared: the table of accuracy against cost that comes out of a study."""
