"""The id of the SLURM job in which a run goes on, and the nodes that its next job excludes."""

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

    def exclude_nodes(self, nodes: list[str]) -> None:
        self._files.write("excluded-nodes", "".join(f"{node}\n" for node in nodes))
