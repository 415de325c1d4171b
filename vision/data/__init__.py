"""Images in: labelled sources, augmentation, and the data sets trainers read."""
