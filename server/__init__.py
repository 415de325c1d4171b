"""The server: engine, targets, API, command line."""
