"""What the commands of `launch data` print: a dataset, its classes, the lines of a recipe, and a progress bar."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from launcher.commands import console

if TYPE_CHECKING:
    from trainer.data.storage.dataset import Manifest

BAR = 40
CLASSES_SHOWN = 5


def print_published(place: str, manifest: "Manifest") -> None:
    num_shards, num_bytes = len(manifest.shards), sum(s.size for s in manifest.shards)
    console.echo(f"{'dataset':<12}{place}")
    console.echo(
        f"{'records':<12}{manifest.num_examples:,} in {_many(num_shards, 'shard')}, {size(num_bytes)}"
    )
    if manifest.classes:
        console.echo(f"{'classes':<12}{len(manifest.classes):,}")
    console.echo(f"{'digest':<12}{manifest.digest}")


def print_recipe(path: str, num_examples: int, num_classes: int) -> None:
    console.echo("\nmodel:")
    console.echo(f"  num_classes: {num_classes}")
    console.echo("data:\n  train:")
    console.echo(f"    path: {path}")
    console.echo(f"    num_examples: {num_examples}")


def print_classes(counts: Any, classes: tuple[str, ...] | None) -> None:
    """The classes with the most and with the fewest images, as bars."""
    import numpy as np

    low, mid, high = int(counts.min()), float(np.median(counts)), int(counts.max())
    each = f"{low:,} images each" if low == high else f"{low:,} to {high:,} images, median {mid:,.0f}"
    console.echo(f"{'classes':<12}{len(counts):,}, {each}")
    order: list[int | None] = [*sorted(range(len(counts)), key=lambda label: (-counts[label], label))]
    if len(order) > 2 * CLASSES_SHOWN:
        order = [*order[:CLASSES_SHOWN], None, *order[-CLASSES_SHOWN:]]
    for label in order:
        if label is None:
            console.echo(f"{'':<12}…")
            continue
        name = classes[label] if classes else str(label)
        bar = "█" * round(BAR * counts[label] / high)
        console.echo(f"{'':<12}{name[:20]:<20} {bar or '▏'} {counts[label]:,}")


def _many(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"


def size(num_bytes: float) -> str:
    """Bytes in decimal units, as storage is sold."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.4g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.4g} TB"


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], Callable[[int, int], None]]]:
    """A bar in a terminal, elsewhere a line every few seconds; both on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), TextColumn("{task.percentage:3.0f} %  {task.description}"), TimeRemainingColumn())
    stderr = Console(stderr=True)
    bar = Progress(*columns, console=stderr, disable=not stderr.is_terminal)
    started = time.monotonic()

    def begin(_num_parts: int, num_bytes: int) -> Callable[[int, int], None]:
        task = bar.add_task(f"0 {what}", total=num_bytes)
        done, printed = 0, time.monotonic()

        def advance(count: int, size: int) -> None:
            nonlocal done, printed
            done += count
            rate = done / max(time.monotonic() - started, 1e-3)
            bar.update(task, advance=size, description=f"{done:,} {what}, {rate:,.0f}/s")
            if bar.disable and time.monotonic() - printed > 5:
                console.echo(f"{done:,} {what}, {rate:,.0f}/s", err=True)
                printed = time.monotonic()

        return advance

    with bar:
        yield begin
