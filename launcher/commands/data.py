"""The commands `launch data …`: from images to a dataset that training streams.

Beside host/worker.py the one file of launcher/ that imports trainer: only trainer.data, inside functions, never jax.
"""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from configs.errors import UserError
from configs.google import NoAccessError, UnreachableError
from launcher.commands import console, data_report
from launcher.commands.arguments import Recipe, load_recipe

if TYPE_CHECKING:
    from configs.schema import RunConfig


class DataCommand(click.Command):
    """A permanent error of storage becomes one line, as every mistake of the user."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UnreachableError as e:
            raise UserError(f"{e}; run it again") from None
        except BrokenPipeError:
            raise  # click handles it
        except OSError as e:
            where = f"{e.filename}: " if e.filename else ""
            raise UserError(f"{where}{e.strerror or e}") from None


class DataCommands(click.Group):
    command_class = DataCommand


def check_datasets(config: "RunConfig", *, is_read_here: bool) -> None:
    """Open the datasets of a run, so that their errors are shown before anything is created. Raises UserError.

    Datasets that only hosts elsewhere have to read are opened where they are in a bucket. That this machine has no
    access to the bucket is then said, and is no error.
    """
    places = [config.data.train.path or "", config.data.eval.path or ""]
    if config.data.source != "records" or (
        not is_read_here and not all(p.startswith("gs://") for p in places)
    ):
        return
    from trainer.data.sources.records import open_datasets

    try:
        open_datasets(config)
    except (NoAccessError, UnreachableError) as e:
        if is_read_here:
            raise UserError(f"{e}; try again") if isinstance(e, UnreachableError) else e from None
        console.echo(f"not checked {e}; whether the hosts can read it shows when they start", err=True)


@click.group(cls=DataCommands)
def data() -> None:
    """Prepare and check image datasets."""


_POSITIVE, _NOT_NEGATIVE = click.IntRange(min=1), click.IntRange(min=0)
_jobs = click.option(
    "--jobs", type=_POSITIVE, default=os.cpu_count(), help="Number of processes. Default: one per core."
)
_first_label = click.option(
    "--first-label", type=_NOT_NEGATIVE, default=0, show_default=True,
    help="Smallest label in SRC, which is subtracted from all labels; 1 for TFRecords with labels 1 to 1,000.",
)  # fmt: skip


@data.command()
@click.argument("kind", type=click.Choice(["imagefolder", "tfrecord", "webdataset", "parquet"]))
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="DST")
@click.option(
    "--resize", type=click.IntRange(min=8), help="Shrink larger images to this short side in pixels."
)
@click.option(
    "--shard-mib",
    type=_POSITIVE,
    default=128,
    show_default=True,
    help="Size of each shard in MiB, measured before --resize.",
)
@click.option(
    "--classes",
    help="Use the class names and labels of this dataset; for the held-out split, give the training dataset.",
)
@click.option(
    "--seed", type=_NOT_NEGATIVE, default=0, show_default=True, help="Seed for shuffling an imagefolder."
)
@_first_label
@_jobs
def convert(
    kind: str, source: str, destination: str, resize: int | None, shard_mib: int, classes: str | None,
    seed: int, first_label: int, jobs: int,
) -> None:  # fmt: skip
    """Write the images of SRC as a dataset at DST.

    SRC and DST are folders or gs://bucket/prefix; SRC may end in a pattern, as in data/train-*. An interrupted
    conversion resumes when the command is repeated. DST is a usable dataset only after the last shard is written.
    """
    from trainer.data.tools import convert as tool

    names = None if classes is None else tool.read_classes(classes)
    settings = tool.Settings(
        kind=kind, resize=resize, shard_mib=shard_mib, first_label=first_label, seed=seed, classes=names
    )
    with data_report.progress_bar("images") as begin:
        manifest = tool.convert(source, destination, settings, jobs=jobs, begin=begin)
    data_report.print_published(destination, manifest)


@data.command()
@click.argument("source", metavar="SRC")
@click.option(
    "--to", "destination", help="Folder or gs:// prefix for the index. Default: next to the shards."
)
@_first_label
@_jobs
def index(source: str, destination: str | None, first_label: int, jobs: int) -> None:
    """Make the existing shards at SRC a dataset, without changing them.

    Shards are ArrayRecord (group_size:1,uncompressed), TFRecord or WebDataset tar. SRC may end in a pattern,
    as in gs://bucket/imagenet/train-*; --to is then required.
    """
    from trainer.data.tools.index import index as run

    with data_report.progress_bar("records") as begin:
        manifest = run(source, destination, first_label=first_label, jobs=jobs, begin=begin)
    data_report.print_published(destination or source, manifest)


@data.command()
@click.argument("path")
@click.option("--decode/--no-decode", default=True, show_default=True, help="Also decode each image.")
@_jobs
def verify(path: str, decode: bool, jobs: int) -> None:
    """Read every record of the dataset at PATH and list the damaged ones."""
    from trainer.data.storage.dataset import open_dataset
    from trainer.data.tools.verify import verify as run

    dataset = open_dataset(path)
    with data_report.progress_bar("records") as begin:
        progress = begin(len(dataset.objects), sum(obj.size for obj in dataset.objects))
        bad = run(dataset, decode=decode, jobs=jobs, progress=progress)
    for b in bad:
        console.echo(f"bad         {b.shard} byte {b.offset:,} (record {b.record}): {b.reason}")
    checked = "read and decoded" if decode else "read"
    console.echo(f"{'verified':<12}{len(dataset):,} records {checked}, {len(bad) or 'none'} bad")
    sys.exit(1 if bad else 0)


@data.command()
@click.argument("path")
@click.option(
    "--sheet", type=click.Path(dir_okay=False, path_type=Path), help="Write a contact sheet to this PNG file."
)
@click.option(
    "--count", type=_POSITIVE, default=64, show_default=True, help="Number of images on the contact sheet."
)
def inspect(path: str, sheet: Path | None, count: int) -> None:
    """Summarize the dataset at PATH, and print the lines of a recipe for it."""
    from trainer.data.storage.dataset import open_dataset
    from trainer.data.tools.summary import summarize, write_sheet

    dataset = open_dataset(path)
    manifest, summary = dataset.manifest, summarize(dataset)
    shards = sum(obj.size for obj in dataset.objects)
    mean, low, high = map(data_report.size, (summary.mean, summary.smallest, summary.largest))
    console.echo(f"dataset     {path}")
    console.echo(f"shards      {len(dataset.objects):,} of {manifest.format}, {data_report.size(shards)}")
    console.echo(f"records     {len(dataset):,}, mean {mean} ({low} to {high})")
    console.echo(f"digest      {manifest.digest}")
    if manifest.base:
        console.echo(f"base        {manifest.base}")
    data_report.print_classes(summary.counts, manifest.classes)
    if summary.sorted_by_class:
        console.echo(
            "order       the dataset is sorted by class, so data.shuffle = blocks would shuffle poorly: "
            "convert the images, or set data.shuffle=global"
        )
    data_report.print_recipe(path, len(dataset), len(summary.counts))
    if sheet is not None:
        console.echo(f"\n{write_sheet(dataset, sheet, count)} images in {sheet}")


@data.command()
@click.argument("config", type=Recipe())
@click.argument("overrides", nargs=-1, metavar="[section.key=value]...")
@click.option("--hosts", type=_POSITIVE, default=1, show_default=True, help="Number of hosts of the run.")
@click.option("--host", type=_NOT_NEGATIVE, help="Print only the samples of this host. Default: all hosts.")
@click.option(
    "--start",
    type=_NOT_NEGATIVE,
    default=0,
    show_default=True,
    help="First position to print, which is the number of images seen before it.",
)
@click.option("--count", type=_POSITIVE, default=64, show_default=True, help="Number of samples to print.")
def order(
    config: Path, overrides: tuple[str, ...], hosts: int, host: int | None, start: int, count: int
) -> None:
    """Print the samples in the order of training, one per line: POSITION SHARD RECORD LABEL."""
    from trainer.data.tools.keys import keys

    if host is not None and host >= hosts:
        raise UserError(f"--host {host}: with --hosts {hosts}, must be 0 to {hosts - 1}")
    for key in keys(load_recipe(config, overrides), hosts=hosts, host=host, start=start, num_keys=count):
        console.echo(f"{key.position} {key.shard} {key.record} {key.label}")
