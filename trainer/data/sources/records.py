"""The source `records`: encoded images in shards, in a folder or under gs://.

Opening checks all that can be checked before the first step. A sample is read as bytes, verified, decoded,
cropped.
"""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np

from configs.errors import UserError
from configs.schema import DataConfig, RunConfig
from trainer.data.order import ProcessStream
from trainer.data.pixels.transform import eval_image, train_image
from trainer.data.split import Sample, padding_sample
from trainer.data.storage.cache import BlockCache
from trainer.data.storage.dataset import Dataset, open_dataset
from trainer.data.storage.fetch import Fetcher
from trainer.data.storage.reader import DamagedRecordError, Reader

_log = logging.getLogger(__name__)
EVAL_MEMORY_SHARE = 0.25
"""Evaluation gets this share of `data.memory_mib`. Training keeps its own part while an evaluation runs."""
WINDOW_MEMORY_FACTOR = 1.25
"""The windows in use take up to this much more than the mean size of a record suggests."""


def open_splits(config: RunConfig) -> tuple["RecordsSplit", "RecordsSplit"]:
    """Open both splits, with one pool of connections and one cache.

    Raises UserError if the data is not as the recipe says.
    """
    train, held_out = open_datasets(config)
    size = sum(obj.size for obj in train.objects)
    if config.data.cache is not None and train.store.is_remote and size > config.data.cache_gib * 2**30:
        _log.warning(
            "data.cache_gib = %g is less than the %.4g GiB of %s: blocks are read anew as often as they are dropped",
            config.data.cache_gib, size / 2**30, train.store.url,
        )  # fmt: skip
    # One pool for both splits, so that evaluation does not double the connections.
    fetcher = Fetcher(cache=_cache(config.data))
    return RecordsSplit(config, train, fetcher), RecordsSplit(config, held_out, fetcher)


def open_datasets(config: RunConfig) -> tuple[Dataset, Dataset]:
    """Open both datasets and check them against each other and against the recipe. Raises UserError."""
    train, held_out = config.data.train.path, config.data.eval.path
    # DataConfig refuses a recipe of this source without them.
    assert train is not None
    assert held_out is not None
    datasets = _open_checked(config, "train", train), _open_checked(config, "eval", held_out)
    _check_classes(*datasets)
    return datasets


def _open_checked(config: RunConfig, split: str, path: str) -> Dataset:
    try:
        dataset = open_dataset(path)
    except UserError as e:
        raise type(e)(f"data.{split}.path: {e}") from None  # the kind of the error tells whose it is to mend
    # The plan has computed steps and epochs from the configured number.
    configured = getattr(config.data, split).num_examples
    if len(dataset) != configured:
        raise UserError(
            f"data.{split}.num_examples = {configured}, but {path} holds {len(dataset)}; set it to that"
        )
    labels = dataset.records["label"]
    outside = np.flatnonzero((labels < 0) | (labels >= config.model.num_classes))
    if len(outside):
        raise UserError(
            f"{path}: {len(outside)} labels are outside of model.num_classes = {config.model.num_classes}, the "
            f"first is {labels[outside[0]]} at record {outside[0]}; raise model.num_classes, or make the labels "
            "start at 0 with --first-label of `launch data`"
        )
    return dataset


def _check_classes(train: Dataset, held_out: Dataset) -> None:
    a, b = train.manifest.classes, held_out.manifest.classes
    if a is None or b is None or a == b:
        return
    label = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    names = [repr(c[label]) if label < len(c) else "none" for c in (a, b)]
    raise UserError(
        f"data.train and data.eval name their classes differently: label {label} is {names[0]} in one, {names[1]} "
        "in the other; convert the latter with --classes and the folder of the former"
    )


def _cache(data: DataConfig) -> BlockCache | None:
    if data.cache is None:
        return None
    try:
        return BlockCache(Path(data.cache), int(data.cache_gib * 2**30))
    except OSError as e:
        raise UserError(
            f"data.cache = {data.cache} cannot be used: {e}; give a folder on a local disk"
        ) from None


class RecordsSplit:
    """One split of the source."""

    def __init__(self, config: RunConfig, dataset: Dataset, fetcher: Fetcher):
        self._config, self._dataset, self._fetcher = config, dataset, fetcher
        self.digest = dataset.manifest.digest
        self.block_starts = dataset.block_starts()

    def __len__(self) -> int:
        return len(self._dataset)

    def samples(self, stream: ProcessStream, *, train: bool) -> "RecordSamples":
        """Start to read the samples of `stream`.

        Raises UserError if `data.memory_mib` is too little for its windows.
        """
        budget = (
            self._config.data.memory_mib * 2**20 * (1 - EVAL_MEMORY_SHARE if train else EVAL_MEMORY_SHARE)
        )
        self._check_budget(stream, budget)
        # A folder needs no cache: the operating system keeps what it has read.
        cached = self._config.data.cache is not None and self._dataset.store.is_remote
        reader = Reader(
            self._dataset,
            stream,
            self._fetcher,
            budget_bytes=int(budget),
            block_starts=self.block_starts if cached else None,
        )
        config, seed = self._config, self._config.train.seed

        def decode(encoded: np.ndarray, position: int) -> np.ndarray:
            if train:
                return train_image(
                    encoded, seed=seed, position=position, data=config.data, augment=config.augment
                )
            return eval_image(encoded, data=config.data)

        return RecordSamples(config, self._dataset, stream, reader, decode)

    def _check_budget(self, stream: ProcessStream, budget: float) -> None:
        """Raise UserError if memory does not hold one window of each lane that this process reads."""
        order = stream.order
        windows = len(np.unique(stream.rows * order.lanes // stream.batch_size)) * order.window
        # The mean suffices, because thousands of records are held at once.
        mean_bytes = float(self._dataset.records["length"].mean())
        needed = min(windows, len(self)) * mean_bytes * WINDOW_MEMORY_FACTOR
        if needed > budget:
            data = self._config.data
            raise UserError(
                f"data.memory_mib = {data.memory_mib:g} is too little: shuffling {order.lanes} lanes in windows of "
                f"{order.window} records of {mean_bytes / 1024:,.0f} KiB holds {needed / 2**20:,.0f} MiB on this "
                f"process, {budget / data.memory_mib / 2**20:.0%} of the setting are for it; raise it, or lower "
                "data.window in a new run"
            )


class RecordSamples:
    """The samples of one process. A record that cannot be read is treated as `data.on_bad_record` says."""

    def __init__(
        self,
        config: RunConfig,
        dataset: Dataset,
        stream: ProcessStream,
        reader: Reader,
        decode: Callable[[np.ndarray, int], np.ndarray],
    ):
        self._data, self._dataset, self._stream = config.data, dataset, stream
        self._reader, self._decode = reader, decode
        self._bad_records: set[int] = set()

    def __len__(self) -> int:
        return len(self._stream)

    def __repr__(self) -> str:
        return f"RecordSamples({len(self)})"

    def __getitem__(self, i: int) -> Sample:
        position = self._stream.position(int(i))
        if position is None:
            return padding_sample(self._data.image_size)
        with self._reader.record(position) as (index, image):
            try:
                return self._sample(self._reader.verified(image, index), index, position)
            except (DamagedRecordError, ValueError) as e:
                return self._substitute(index, position, e)

    def _sample(self, encoded: np.ndarray, index: int, position: int) -> Sample:
        return Sample(self._decode(encoded, position), self._dataset.records["label"][index].astype(np.int32))

    def _substitute(self, bad: int, position: int, error: Exception) -> Sample:
        """The sample that replaces record `bad`. The dataset alone decides which one, so all hosts take the same."""
        self._report_bad(bad, error)
        if self._data.on_bad_record == "mask":
            return padding_sample(self._data.image_size)
        # The next good record in the dataset's own order, which no number of hosts changes.
        for index in range(bad + 1, bad + len(self._dataset)):
            index %= len(self._dataset)
            try:
                return self._sample(self._reader.read_one(index), index, position)
            except (DamagedRecordError, ValueError) as e:
                self._report_bad(index, e)
        raise UserError(f"{self._dataset.store.url}: none of its records can be read")

    def _report_bad(self, bad: int, error: Exception) -> None:
        """Warn of a bad record, or raise UserError if the recipe allows none or no more."""
        what = f"{self._dataset.describe(bad)}: {error}"
        if self._data.on_bad_record == "raise":
            raise UserError(f"{what}; restore it, or set data.on_bad_record to substitute or mask") from None
        # A record comes again in every epoch, but counts once.
        if bad not in self._bad_records:
            self._bad_records.add(bad)
            _log.warning("%s (data.on_bad_record = %s)", what, self._data.on_bad_record)
        if len(self._bad_records) > self._data.max_bad_records:
            raise UserError(
                f"{len(self._bad_records)} bad records, more than data.max_bad_records = {self._data.max_bad_records}; "
                f"the last: {what}. `launch data verify` lists them all"
            ) from None

    def metrics(self) -> dict[str, float]:
        return {**self._reader.metrics(), "data/bad_records": len(self._bad_records)}

    def close(self) -> None:
        self._reader.close()
