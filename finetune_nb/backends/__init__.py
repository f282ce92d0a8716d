"""Training backends. Each is loaded by its registry name only; none imports another."""
