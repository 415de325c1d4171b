"""Semantic segmentation: a pyramid-pooling head on the compact backbones, its data and its measure."""
