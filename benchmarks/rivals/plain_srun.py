"""A task of plain `srun`: jax finds SLURM by itself, with its defaults, and trains. For benchmarks/slurm.py."""

import os
import sys
from pathlib import Path

import jax

from configs.load import load
from trainer.loop import train

jax.distributed.initialize()

recipe, root = sys.argv[1:]
config = load(Path(recipe), [f"mesh.batch={jax.device_count()}", "train.steps=1000"])
jax.config.update("jax_compilation_cache_dir", f"{os.environ['XDG_CACHE_HOME']}/podlaunch/compiled")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def report(**words: object) -> None:
    if "step" in words and words.get("phase") != "compiling":
        Path(root, "steps", f"{jax.process_index()}-{os.getpid()}").write_text(str(words["step"]))


train(config, steps=1000, directory=Path(root, "plain"), report=report, stop_requested=lambda: False)
