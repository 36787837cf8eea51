"""What it costs in accuracy that random crops are not antialiased: the same trainings with and without.

Not ImageNet, but in its geometry: 375 rows to 224 become 54 to 32, so that a crop shrinks as much. Outlines of
scikit-learn's handwritten digits, one or two pixels thick, light on a dark, noisy ground, are about the finest
structure that an image can have: a case made hard on purpose. Evaluation is antialiased always. Each seed trains
both ways, and the difference is taken seed by seed.

    python -m benchmarks.antialias
"""

import argparse
import io
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from benchmarks._common import REPOSITORY, print_table
from launcher.rundir import RunDirectory

SIZE = (72, 54)
RENDERINGS = 4
"""Of each digit, each in other colours and on another texture."""
NUM_HELD_OUT = 360
SETTINGS = (
    "data.source=records", "data.image_size=32", "data.eval_resize=32", "data.mean=[0.5,0.5,0.5]",
    "data.std=[0.25,0.25,0.25]", "augment.crop_scale=[0.5,1]", "model.width=8", "train.batch_size=64",
)  # fmt: skip


def render(digit: np.ndarray, rng: np.random.Generator) -> bytes:
    """A JPEG of the outline of one 8×8 digit, of values in [0, 1]."""
    width, height = SIZE
    smooth = Image.fromarray(digit.astype(np.float32)).resize((height, height), Image.Resampling.BICUBIC)
    ink = np.zeros((height, width))
    left = rng.integers(width - height + 1)
    ink[:, left : left + height] = np.abs(np.asarray(smooth) - 0.5) < 0.12
    paper, pen = rng.uniform(0.1, 0.3, 3), rng.uniform(0.7, 0.9, 3)
    image = np.where(ink[..., None], pen, paper) + rng.normal(0, 0.15, (height, width, 1))
    encoded = io.BytesIO()
    Image.fromarray(np.uint8(255 * image.clip(0, 1))).save(encoded, "JPEG", quality=92)
    return encoded.getvalue()


def write(folder: Path) -> None:
    """train/ and eval/, with a folder a class."""
    digits, rng = load_digits(), np.random.default_rng(0)
    for i, n in enumerate(np.random.default_rng(1).permutation(len(digits.target))):
        split = folder / ("eval" if i < NUM_HELD_OUT else "train") / str(digits.target[n])
        split.mkdir(parents=True, exist_ok=True)
        for k in range(RENDERINGS):
            (split / f"{i}-{k}.jpg").write_bytes(render(digits.images[n] / 16, rng))


def launch(*arguments: str) -> None:
    command = [str(Path(sys.executable).with_name("launch")), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)


def accuracy(folder: Path, antialias: bool, seed: int, epochs: int) -> float:
    """Of one training, on the held-out images."""
    name = f"{'with' if antialias else 'without'}-{seed}"
    sizes = {"eval": NUM_HELD_OUT * RENDERINGS}
    sizes["train"] = 1797 * RENDERINGS - sizes["eval"]
    splits = [f"data.{s}={{path: '{folder}/{s}-shards', num_examples: {n}}}" for s, n in sizes.items()]
    launch(
        "--cluster", "local-1x1", "--name", name, "--root", str(folder / "runs"),
        str(REPOSITORY / "configs" / "quickstart.yaml"), *SETTINGS, *splits,
        f"augment.antialias={str(antialias).lower()}", f"train.seed={seed}", f"train.epochs={epochs}",
    )  # fmt: skip
    result = RunDirectory(folder / "runs" / name).result()
    assert result is not None
    return float(result["metrics"]["eval/accuracy"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=4)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder)
        for split in ("train", "eval"):
            launch("data", "convert", "imagefolder", str(folder / split), str(folder / f"{split}-shards"))
        found = [
            [accuracy(folder, antialias, seed, arguments.epochs) for antialias in (True, False)]
            for seed in range(arguments.seeds)
        ]
    rows = [[str(seed), *(f"{a:.2%}" for a in pair)] for seed, pair in enumerate(found)]
    print_table(["seed", "antialiased", "not"], rows)
    gains = [100 * (plain - antialiased) for antialiased, plain in found]
    spread = f"{min(gains):+.2f} to {max(gains):+.2f}"
    print(f"without antialiasing: {statistics.mean(gains):+.2f} points of accuracy ({spread})")


if __name__ == "__main__":
    main()
