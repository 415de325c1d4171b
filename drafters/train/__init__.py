"""Training of drafters and of the small language models they serve; sees a FeatureSource, never a target."""
