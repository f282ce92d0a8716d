"""Computes answers from records: which groups teach, how rollouts differ, and whether one run beat another."""
