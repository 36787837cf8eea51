"""Commands that tell what may be written: the names of clusters, and the schema of recipes."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from configs.errors import UserError

if TYPE_CHECKING:
    from launcher.plan import ClusterSpec


@click.command()
@click.argument("kind", required=False)
def clusters(kind: str | None) -> None:
    """List the values of --cluster; with KIND = tpu, all Cloud TPU slices."""
    from configs.clusters import named_clusters
    from launcher.clusters import KINDS, default_cluster, from_settings

    if kind == "tpu":
        return _print_tpus()
    if kind is not None:
        raise UserError(f"clusters {kind}: allowed: tpu, or nothing")
    for pattern, meaning in KINDS.items():
        click.echo(f"{pattern:<12} {meaning}")
    for name, cluster in named_clusters().items():
        spec = from_settings(name, cluster)
        hosts = "VMs" if spec.backend == "tpu" else "nodes"
        click.echo(f"{name:<12} {_devices(spec)} on {spec.hosts} {hosts}")
    try:
        spec = default_cluster()
        click.echo(f"{'default':<12} {spec.name}: {_devices(spec)}")
    except UserError as e:
        click.echo(f"{'default':<12} none: {e}")


def _devices(spec: "ClusterSpec") -> str:
    return f"{spec.processes} × {spec.devices_per_process} {spec.platform}"


def _print_tpus() -> None:
    from launcher.accelerators import GENERATIONS, tpu_slice

    row = "{:<17} {:<9} {:>6} {:>5} {:>12} {:>12}   {}".format
    click.echo(row("--cluster", "topology", "chips", "VMs", "GiB a chip", "JAX devices", "runtime"))
    for generation in GENERATIONS.values():
        for size, topology in generation.sizes.items():
            tpu, name = tpu_slice(generation, topology), f"tpu-{generation.name}-{size}"
            hbm, devices = generation.hbm_gib, tpu.vms * tpu.devices_per_vm
            click.echo(row(name, tpu.topology, tpu.chips, tpu.vms, hbm, devices, generation.runtime))
    in_cores = ", ".join(g.name for g in GENERATIONS.values() if g.counts == "cores")
    click.echo(f"The size in a name is the number of cores (two per chip) for {in_cores},")
    click.echo("and the number of chips for the others. A topology can replace the size,")
    click.echo("as in tpu-v4-2x2x4. A suffix xN, as in tpu-v4-32x2, requests N slices.")
    in_cubes = " and ".join(g.name for g in GENERATIONS.values() if g.max_cubes)
    click.echo(f"Beyond 64 chips, {in_cubes} also have any AxBxC of multiples of 4,")
    click.echo("such as tpu-v4-4x4x16, and the sizes of these, such as tpu-v5p-640.")


@click.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path), required=False)
def schema(file: Path | None) -> None:
    """Print the JSON schema of recipes, or write it to FILE, for editors."""
    from configs.schema import json_schema

    text = json.dumps(json_schema(), indent=2) + "\n"
    if file is None:
        click.echo(text, nl=False)
    else:
        try:
            file.write_text(text, encoding="utf-8")
        except OSError as e:
            raise UserError(f"{file} cannot be written: {e.strerror}") from None
