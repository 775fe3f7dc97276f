"""What a fit runs on: samples in memory and on disk, processes, checkpoints, the clock."""
