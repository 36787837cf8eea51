"""The id of the SLURM job in which a run goes on, the nodes that failed twice, and those its next job excludes."""

from launcher.rundir.storage import Files


class JobFiles:
    """The files of a run that concern its SLURM job."""

    def __init__(self, files: Files):
        self._files = files

    def id(self) -> str | None:
        """Id of the job; None where the run was started without a scheduler."""
        return (self._files.read("job") or "").strip() or None

    def write_id(self, job: str | None) -> None:
        self._files.write("job", job or "")

    def excluded_nodes(self) -> list[str]:
        return (self._files.read("excluded-nodes") or "").split()

    def bad_nodes(self) -> list[str]:
        """Nodes that failed twice; those that are not excluded are tried again, since no others are left."""
        return (self._files.read("bad-nodes") or "").split()

    def write_bad_nodes(self, nodes: list[str], *, exclude: bool) -> None:
        for name, content in (("bad-nodes", nodes), ("excluded-nodes", nodes if exclude else [])):
            self._files.write(name, "".join(f"{node}\n" for node in content))
