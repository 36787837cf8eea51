"""What the machine on which this runs knows of itself: devices, network, SLURM's step, Google's metadata, its code."""
