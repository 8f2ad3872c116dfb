"""The process around TorchServe: checks, start, readiness, stop, and a small client."""
