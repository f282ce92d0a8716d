"""Example workflows, complete enough to be trained."""
