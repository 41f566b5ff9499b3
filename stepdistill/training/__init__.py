"""The training loop and what it stands on: session, checkpoints, processes, sharding, evaluation."""
