"""LitData's writer, with one worker, on the files as they are."""

from pathlib import Path

from _timing import SHARD_BYTES, files, run_conversion, sample
from litdata import optimize


def record(file: str) -> dict[str, bytes | int]:
    return sample(Path(file))


def write(source: Path, destination: Path) -> None:
    sources = [str(file) for file in files(source)]
    optimize(record, sources, str(destination), num_workers=1, chunk_bytes=SHARD_BYTES, verbose=False)


if __name__ == "__main__":
    run_conversion(write)
