"""Language models as a workflow sees them, and the recording of their calls."""
