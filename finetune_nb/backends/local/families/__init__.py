"""What model families differ in: what their layers keep, how their prompts are batched, where their positions change."""
