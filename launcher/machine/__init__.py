"""What a process can find out about its own machine: devices, network, SLURM's step, Google's metadata, the code."""
