"""Scoring rollouts."""
