"""What a run leaves on disk: config, checkpoints, logs."""
