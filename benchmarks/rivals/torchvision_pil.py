"""torchvision's PIL path to the normalised tensor, as its reference training has it, but for the flip."""

import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from _timing import BATCH, SIZE, Pass, batches, jpegs, run
from PIL import Image
from torchvision import datasets, transforms

TRANSFORM = transforms.Compose(
    [
        transforms.RandomResizedCrop(SIZE),
        transforms.ToTensor(),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
)


def decode(folder: Path, cores: int) -> Pass:
    """In threads and without batches, which DataLoader takes longer to make than the images."""
    torch.set_num_threads(1)
    encoded, pool = jpegs(folder), ThreadPoolExecutor(cores)

    def work(jpeg: bytes) -> torch.Tensor:
        return TRANSFORM(Image.open(io.BytesIO(jpeg)).convert("RGB"))

    return lambda: sum(1 for _ in pool.map(work, encoded))


def stream(folder: Path, cores: int) -> Pass:
    """From the files themselves to batches."""
    images = datasets.ImageFolder(folder / "images", TRANSFORM)
    sampler = torch.utils.data.RandomSampler(images, num_samples=100 * len(images))
    workers = 0 if cores == 1 else cores  # alone on its core, a worker is only in the way
    loader = torch.utils.data.DataLoader(images, BATCH, sampler=sampler, num_workers=workers)
    return batches(iter(loader), len(images))


run(decode=decode, stream=stream)
