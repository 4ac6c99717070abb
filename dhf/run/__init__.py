"""A run on disk and on the terminal: configuration, directory, checkpoints, metrics, monitor, pictures."""
