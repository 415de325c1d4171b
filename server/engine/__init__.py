"""The engine: requests in, tokens out; one thread owns it and every tensor."""
