"""Asynchronous Orbax checkpoints: written while training goes on, verified before they are trusted.

    STEP/            arrays and data position; complete once it has this name, on gs:// once commit_success.txt is there
    STEP/crc32c.json checksum of each file, written after the commit
    STEP.damaged     a checkpoint whose files no longer match their checksums; kept for you to look at
    scores.json      evaluation metric by step, for keep_best

Orbax notices a damaged index, but not a flipped byte inside an array; the checksums do. All this lies in a
folder or under gs://: Orbax and etils write to both, and the small files go through the Store that the data
is read with.
"""

import json
import logging
import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from configs import checkpoints as checkpoint_files
from configs.schema import CheckpointConfig
from trainer.data.storage.store import Store, checksum, open_store
from trainer.mesh import wait_for_all
from trainer.state import TrainState

CHECKSUMS = "crc32c.json"
SCORES = "scores.json"
UNFINISHED = ".orbax-checkpoint-tmp"
"""Part of the name of a folder that Orbax has not committed; under gs:// it writes to the final name at once."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataPosition:
    """Where the data stream stands, and which data it is."""

    position: int
    """Number of samples that training has consumed."""
    seed: int
    digest: str
    """Identifies the samples and their numbering."""


@dataclass
class _KeepBest(policies.PreservationPolicy):
    """Keeps the n checkpoints with the highest score. Scores come late, because evaluation follows the save."""

    n: int
    scores: dict[int, float]

    def should_preserve(
        self, checkpoints: Sequence[policies.PolicyCheckpointInfo], *, context: policies.PreservationContext
    ) -> Sequence[bool]:
        # A checkpoint without a score is not among the best; LatestN decides alone whether it stays.
        scored = sorted((c.step for c in checkpoints if c.step in self.scores), key=self.scores.__getitem__)
        best = set(scored[len(scored) - self.n :]) if self.n else set()
        return [c.step in best for c in checkpoints]


class _SaveErrorHandler(logging.Handler):
    """Keeps the exception that Orbax's saving thread logs when it fails.

    With several processes Orbax raises the exception only behind a barrier, which the other processes reach
    after its time limit of minutes. The log has it at once.
    """

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.error: BaseException | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and "background save thread" in record.getMessage():
            self.error = record.exc_info[1]


class Checkpointer:
    """Saves, scores and restores train states, on all processes together.

    The checkpoints lie in `config.directory`, by default in `directory`. Raises UserError if that place
    cannot be written.
    """

    def __init__(self, directory: Path, config: CheckpointConfig):
        location = config.directory or str(directory)
        self._directory = epath.Path(location)
        self._store = open_store(location)
        self._score_sign = 1 if config.metric == "eval/accuracy" else -1
        self._saving_step: int | None = None
        self._save_errors = _SaveErrorHandler()
        logging.getLogger("absl").addHandler(self._save_errors)
        self._checksummer: threading.Thread | None = None
        # On every host, so that each one without permission says so in one line; Orbax would need fifty.
        checkpoint_files.check(location)
        if jax.process_index() == 0:
            self._directory.mkdir(parents=True, exist_ok=True)
            _clear_unfinished(self._directory)
            _set_damaged_aside(self._directory, self._store)
        # Only process 0 renames and removes; the others must not look before it has finished.
        wait_for_all("checkpoints verified")
        self.scores: dict[int, float] = _read_scores(self._store)
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(
                    [policies.LatestN(config.keep_last), _KeepBest(config.keep_best, self.scores)]
                ),
                enable_async_checkpointing=True,
            ),
        )

    @property
    def latest_step(self) -> int | None:
        """Step of the newest checkpoint that is complete and undamaged."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, data: DataPosition) -> None:
        """Copy `state` off the devices and return; the files are written in the background.

        Waits for the save before, and raises what went wrong with it.
        """
        self.wait()
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_by_dotted_name(state)), data=ocp.args.JsonSave(vars(data))
            ),
        )
        self._saving_step = step

    def poll(self) -> None:
        """To be called at every step. Raises what a background save raised.

        After a commit it writes checksums.
        """
        if self._save_errors.error is not None:
            raise self._save_errors.error
        if self._saving_step is not None and not self._manager.is_saving_in_progress():
            self._finish_save()

    def wait(self) -> None:
        """Block until the last save is on disk."""
        while self._saving_step is not None:
            self.poll()
            # Polled, because Orbax's own wait would not raise an error of the saving thread before its time
            # limit.
            time.sleep(0.01)
        if self._checksummer is not None:
            self._checksummer.join()
            self._checksummer = None

    def record_score(self, step: int, value: float) -> None:
        """Record the evaluation metric of `step`, by which keep_best chooses."""
        self.scores[step] = self._score_sign * value
        if jax.process_index() == 0:
            self._store.write(SCORES, json.dumps(self.scores).encode())

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, DataPosition]:
        """The state of `step` with the shapes and shardings of `abstract`, whatever mesh it was saved on."""
        # Into the shardings of `abstract`, because the mesh may be another than the one that was saved from.
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(_by_dotted_name(abstract)), data=ocp.args.JsonRestore()
            ),
        )
        structure = jax.tree.structure(abstract)
        leaves = [restored.state[name] for name in _by_dotted_name(abstract)]
        return jax.tree.unflatten(structure, leaves), DataPosition(**restored.data)

    def close(self) -> None:
        """Wait for the last save, then free what Orbax holds. Raises what went wrong with that save."""
        self.wait()
        logging.getLogger("absl").removeHandler(self._save_errors)
        self._manager.close()

    def _finish_save(self) -> None:
        # The save has finished. This call raises what went wrong with it, and closes its thread.
        self._manager.wait_until_finished()
        step, self._saving_step = self._saving_step, None
        if jax.process_index() == 0:
            # In a thread of its own, because it reads all that was written.
            self._checksummer = threading.Thread(
                target=_write_checksums, args=(self._directory, self._store, step), name="checksums"
            )
            self._checksummer.start()


def _by_dotted_name(state: TrainState) -> dict[str, Any]:
    """Every leaf by its dotted path, in the order of jax.tree.leaves."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _checksums(step: epath.Path) -> dict[str, int]:
    """CRC-32C of every file of a checkpoint, by its path within the checkpoint."""
    if str(step).startswith("gs://"):  # the service keeps checksums, so nothing is downloaded
        sums = checkpoint_files.checksums(str(step))
    else:
        files = (p for p in Path(step).rglob("*") if p.is_file())
        sums = {str(p.relative_to(step)): _crc32c(p) for p in files}
    sums.pop(CHECKSUMS, None)
    return sums


def _crc32c(path: Path) -> int:
    with path.open("rb") as f:
        return checksum(f)


def _write_checksums(directory: epath.Path, store: Store, step: int) -> None:
    try:
        sums = _checksums(directory / str(step))
        if sums:
            store.write(f"{step}/{CHECKSUMS}", json.dumps(sums).encode())
    except FileNotFoundError:
        pass  # a newer save has deleted this checkpoint in the meantime


def _find_damage(directory: epath.Path, store: Store, step: int) -> str | None:
    """What is wrong with a committed checkpoint, or None.

    One without checksums was killed between commit and checksums, and is taken as it is.
    """
    try:
        expected = json.loads(store.read(f"{step}/{CHECKSUMS}"))
    except FileNotFoundError:
        return None
    except ValueError:
        return f"{CHECKSUMS} cannot be read"
    found = _checksums(directory / str(step))
    for name, crc in expected.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != crc:
            return f"{name} does not match its checksum"
    return None


def _clear_unfinished(directory: epath.Path) -> None:
    """Remove what a killed save has left behind.

    Orbax would do so, too, but under gs:// it removes all other folders as well.
    """
    # Under gs:// a folder exists only while an object lies in it.
    if not directory.exists():
        return
    complete = checkpoint_files.steps(str(directory))
    for path in directory.iterdir():
        unfinished = path.name.isdigit() and int(path.name) not in complete
        if unfinished or UNFINISHED in path.name:
            path.rmtree()


def _set_damaged_aside(directory: epath.Path, store: Store) -> None:
    """Rename damaged checkpoints, from the newest on, until one is whole.

    Older ones are verified when they are the newest.
    """
    for step in reversed(checkpoint_files.steps(str(directory))):
        damage = _find_damage(directory, store, step)
        if damage is None:
            return
        aside = directory / f"{step}.damaged"
        _log.warning(
            "checkpoint %d is damaged (%s): set aside as %s, falling back to the one before",
            step, damage, aside,
        )  # fmt: skip
        aside.rmtree(missing_ok=True)
        (directory / str(step)).rename(aside)


def _read_scores(store: Store) -> dict[int, float]:
    try:
        # A score that is not finite compares as neither better nor worse.
        return {int(k): v for k, v in json.loads(store.read(SCORES)).items() if math.isfinite(v)}
    except FileNotFoundError:
        return {}
