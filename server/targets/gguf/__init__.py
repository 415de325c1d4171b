"""GGUF files as targets: the checked container, its configuration, weights and tokenizer."""
