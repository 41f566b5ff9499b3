"""Running pipelines: samples under stock schedulers, stored teacher trajectories, editing, guidance rules."""
