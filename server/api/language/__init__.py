"""Routes of language models: one file per wire format, and what they share."""
