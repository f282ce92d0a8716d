"""Environments of verifiers 0.4."""
