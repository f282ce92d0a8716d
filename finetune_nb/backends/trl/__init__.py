"""Training by TRL, in a process of its own: `trl_dpo` on preferences, `trl_sft` on chosen trajectories."""
