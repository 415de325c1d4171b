"""The HTTP surface: one file for each family of routes, and what they share."""
