"""Import paths of the NeMo Agent Toolkit, for components that were written for it."""
