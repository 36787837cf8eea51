"""The commands `launch data …`: from images to a dataset that training streams. They parse, call and print.

Beside worker.py the one file here that imports trainer, and of it only trainer.data, inside functions; never jax.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from configs.errors import UserError
from configs.google import UnreachableError

if TYPE_CHECKING:
    from configs.schema import RunConfig
    from trainer.data.table import Manifest

BAR = 40
CLASSES_SHOWN = 5


class DataCommand(click.Command):
    """What storage refuses for good is one line, as what the user must mend."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UnreachableError as e:
            raise UserError(f"{e}; run it again") from None
        except BrokenPipeError:
            raise  # click's
        except OSError as e:
            where = f"{e.filename}: " if e.filename else ""
            raise UserError(f"{where}{e.strerror or e}") from None


class DataCommands(click.Group):
    command_class = DataCommand


def check_datasets(config: "RunConfig") -> None:
    """Open the datasets of a run, so that what is wrong with them is told before anything is made. Raises UserError."""
    from trainer.data.records import open_datasets

    try:
        open_datasets(config)
    except UnreachableError as e:
        raise UserError(f"{e}; try again") from None


@click.group(cls=DataCommands)
def data() -> None:
    """Bring images: convert, index, verify, inspect, order."""


_jobs = click.option(
    "--jobs", type=click.IntRange(min=1), default=os.cpu_count(), help="Processes. Default: one a core."
)
_first_label = click.option(
    "--first-label",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="The smallest label of SRC, subtracted from all: 1 for the TFRecords of 1,001 classes.",
)


@data.command()
@click.argument("kind", type=click.Choice(["imagefolder", "tfrecord", "webdataset", "parquet"]))
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="DST")
@click.option(
    "--resize", type=click.IntRange(min=8), help="Shrink larger images to this short side in pixels."
)
@click.option(
    "--shard-mib",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    help="Size of a shard, before --resize.",
)
@click.option(
    "--classes", help="Take the class names, and so the labels, of this dataset: that of train for eval."
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Shuffles an imagefolder."
)
@_first_label
@_jobs
def convert(
    kind: str, source: str, destination: str, resize: int | None, shard_mib: int, classes: str | None,
    seed: int, first_label: int, jobs: int,
) -> None:  # fmt: skip
    """Write the images of SRC as a dataset at DST.

    SRC and DST are folders or gs://bucket/prefix; SRC may end in a pattern, as in data/train-*. Run again, a
    conversion that was ended goes on. Nothing is a dataset before all of it is there.
    """
    from trainer.data.tools import convert as tool

    settings = tool.Settings(
        kind=kind,
        resize=resize,
        shard_mib=shard_mib,
        first_label=first_label,
        seed=seed,
        classes=tool.read_classes(classes) if classes is not None else None,
    )
    with _progress("images") as begin:
        manifest = tool.convert(source, destination, settings, jobs=jobs, begin=begin)
    _print_published(destination, manifest)


@data.command()
@click.argument("source", metavar="SRC")
@click.option("--to", "destination", help="Folder or gs:// prefix for the table. Default: beside the shards.")
@_first_label
@_jobs
def index(source: str, destination: str | None, first_label: int, jobs: int) -> None:
    """Make a dataset of the shards at SRC, which stay as they are.

    Shards are ArrayRecord (group_size:1,uncompressed), TFRecord or WebDataset tar. SRC may end in a pattern,
    as in gs://bucket/imagenet/train-*; then --to says where its table goes.
    """
    from trainer.data.tools.index import index as run

    with _progress("records") as begin:
        manifest = run(source, destination, first_label=first_label, jobs=jobs, begin=begin)
    _print_published(destination or source, manifest)


@data.command()
@click.argument("path")
@click.option(
    "--decode/--no-decode", default=True, show_default=True, help="Whether to decode each image, too."
)
@_jobs
def verify(path: str, decode: bool, jobs: int) -> None:
    """Read each record of the dataset at PATH, and name those that are damaged."""
    from trainer.data.table import open_dataset
    from trainer.data.tools.verify import verify as run

    dataset = open_dataset(path)
    with _progress("records") as begin:
        progress = begin(len(dataset.objects), sum(obj.size for obj in dataset.objects))
        bad = run(dataset, decode=decode, jobs=jobs, progress=progress)
    for b in bad:
        click.echo(f"bad         {b.shard} byte {b.offset:,} (record {b.record}): {b.reason}")
    checked = "read and decoded" if decode else "read"
    click.echo(f"{'verified':<12}{len(dataset):,} records {checked}, {len(bad) or 'none'} bad")
    sys.exit(1 if bad else 0)


@data.command()
@click.argument("path")
@click.option(
    "--sheet", type=click.Path(dir_okay=False, path_type=Path), help="Write a contact sheet, as PNG."
)
@click.option(
    "--count", type=click.IntRange(min=1), default=64, show_default=True, help="Images of the contact sheet."
)
def inspect(path: str, sheet: Path | None, count: int) -> None:
    """What the dataset at PATH holds, and the lines of a recipe for it."""
    from trainer.data.table import open_dataset
    from trainer.data.tools.summary import summarize, write_sheet

    dataset = open_dataset(path)
    manifest, summary = dataset.manifest, summarize(dataset)
    shards = sum(obj.size for obj in dataset.objects)
    rows = {
        "dataset": path,
        "shards": f"{len(dataset.objects):,} of {manifest.format}, {_size(shards)}",
        "records": f"{len(dataset):,}, mean {_size(summary.mean)} "
        f"({_size(summary.smallest)} to {_size(summary.largest)})",
        "digest": manifest.digest,
    }
    if manifest.base:
        rows["base"] = manifest.base
    for label, text in rows.items():
        click.echo(f"{label:<12}{text}")
    _print_classes(summary.counts, manifest.classes)
    if summary.sorted_by_class:
        click.echo(
            "order       neighbours share their class, so data.shuffle = blocks would mix poorly: "
            "convert the images, or set data.shuffle=global"
        )
    _print_recipe(path, len(dataset), len(summary.counts))
    if sheet is not None:
        click.echo(f"\n{write_sheet(dataset, sheet, count)} images in {sheet}")


@data.command()
@click.argument("config", type=str)
@click.argument("overrides", nargs=-1, metavar="[section.key=value]...")
@click.option("--hosts", type=click.IntRange(min=1), default=1, show_default=True, help="Hosts of the run.")
@click.option("--host", type=click.IntRange(min=0), help="Only what this host reads. Default: all hosts.")
@click.option(
    "--start", type=click.IntRange(min=0), default=0, show_default=True, help="First position: images so far."
)
@click.option("--count", type=click.IntRange(min=1), default=64, show_default=True, help="Lines.")
def order(
    config: str, overrides: tuple[str, ...], hosts: int, host: int | None, start: int, count: int
) -> None:
    """The samples that training on CONFIG will see, one a line: POSITION SHARD RECORD LABEL."""
    from configs.load import load
    from configs.recipes import find
    from trainer.data.tools.keys import keys

    if host is not None and host >= hosts:
        raise UserError(f"--host {host}: of --hosts {hosts}, hosts are 0 to {hosts - 1}")
    for key in keys(load(find(config), overrides), hosts=hosts, host=host, start=start, num_keys=count):
        click.echo(f"{key.position} {key.shard} {key.record} {key.label}")


# What is printed


def _print_published(place: str, manifest: "Manifest") -> None:
    num_shards, num_bytes = len(manifest.shards), sum(s.size for s in manifest.shards)
    click.echo(f"{'dataset':<12}{place}")
    click.echo(
        f"{'records':<12}{manifest.num_examples:,} in {_many(num_shards, 'shard')}, {_size(num_bytes)}"
    )
    if manifest.classes:
        click.echo(f"{'classes':<12}{len(manifest.classes):,}")
    click.echo(f"{'digest':<12}{manifest.digest}")


def _print_recipe(path: str, num_examples: int, num_classes: int) -> None:
    click.echo("\nmodel:")
    click.echo(f"  num_classes: {num_classes}")
    click.echo("data:\n  train:")
    click.echo(f"    path: {path}")
    click.echo(f"    num_examples: {num_examples}")


def _print_classes(counts: Any, classes: tuple[str, ...] | None) -> None:
    """The classes with the most and with the fewest images, as bars."""
    import numpy as np

    low, mid, high = int(counts.min()), float(np.median(counts)), int(counts.max())
    each = f"{low:,} images each" if low == high else f"{low:,} to {high:,} images, median {mid:,.0f}"
    click.echo(f"{'classes':<12}{len(counts):,}, of {each}")
    order = sorted(range(len(counts)), key=lambda label: (-counts[label], label))
    shown = (
        order if len(order) <= 2 * CLASSES_SHOWN else [*order[:CLASSES_SHOWN], None, *order[-CLASSES_SHOWN:]]
    )
    for label in shown:
        if label is None:
            click.echo(f"{'':<12}…")
            continue
        name = classes[label] if classes else str(label)
        bar = "█" * round(BAR * counts[label] / high)
        click.echo(f"{'':<12}{name[:20]:<20} {bar or '▏'} {counts[label]:,}")


def _many(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"


def _size(num_bytes: float) -> str:
    """Bytes in decimal units, as storage is sold."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.4g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.4g} TB"


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], Callable[[int, int], None]]]:
    """A bar in a terminal, elsewhere a line every few seconds; both on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), TextColumn("{task.percentage:3.0f} %  {task.description}"), TimeRemainingColumn())
    console = Console(stderr=True)
    bar = Progress(*columns, console=console, disable=not console.is_terminal)
    begun = time.monotonic()

    def begin(num_parts: int, num_bytes: int) -> Callable[[int, int], None]:
        task = bar.add_task(f"0 {what}", total=num_bytes)
        done, printed = 0, time.monotonic()

        def advance(count: int, size: int) -> None:
            nonlocal done, printed
            done += count
            rate = done / max(time.monotonic() - begun, 1e-3)
            bar.update(task, advance=size, description=f"{done:,} {what}, {rate:,.0f}/s")
            if bar.disable and time.monotonic() - printed > 5:
                click.echo(f"{done:,} {what}, {rate:,.0f}/s", err=True)
                printed = time.monotonic()

        return advance

    with bar:
        yield begin
