"""`Run`: the notebook's handle on a finetuning run."""
