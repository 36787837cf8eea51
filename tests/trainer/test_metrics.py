"""Pictures are laid out as said, and event files reach gs:// whole, in order, and not many times over."""

import time
from pathlib import Path

import numpy as np
import pytest
from google.cloud import storage
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboardX import SummaryWriter

from tests.gcs import BUCKET, Server
from trainer.metrics import TensorBoard, captioned_grid
from trainer.upload import Uploader, whole_records


@pytest.fixture
def bucket(gcs: Server) -> storage.Bucket:
    return storage.Client().bucket(BUCKET)


def contents(bucket: storage.Bucket, prefix: str) -> dict[str, bytes]:
    """Objects below `prefix` by name, in the order of their names."""
    return {
        b.name: b.download_as_bytes() for b in sorted(bucket.list_blobs(prefix=prefix), key=lambda b: b.name)
    }


def test_pieces_put_together_are_the_file(bucket: storage.Bucket, tmp_path: Path) -> None:
    uploader = Uploader(f"gs://{BUCKET}/pieces", piece_bytes=2000, interval_seconds=3600)
    writer = SummaryWriter(str(uploader.folder))
    for step in range(200):
        writer.add_scalar("x", step, step)
        if step % 20 == 0:
            writer.flush()
            uploader.send()
    writer.close()
    (local,) = (p.read_bytes() for p in uploader.folder.iterdir())
    uploader.close()
    pieces = contents(bucket, "pieces/")
    assert b"".join(pieces.values()) == local
    assert len(pieces) > 3
    assert max(len(p) for p in pieces.values()) <= 2000
    steps = []
    for name, content in pieces.items():
        file = tmp_path / Path(name).name
        file.write_bytes(content)  # each piece is an event file of its own
        steps += RawEventFileLoader(str(file)).Load()
    assert len(steps) == 201  # and the file's version


def test_a_growing_file_is_not_sent_again_and_again(bucket: storage.Bucket) -> None:
    uploader = Uploader(f"gs://{BUCKET}/bounded", piece_bytes=1000, interval_seconds=3600)
    file = uploader.folder / "events"
    record = (84).to_bytes(8, "little") + bytes(4 + 84 + 4)
    sent = 0
    for _ in range(100):
        with file.open("ab") as f:
            f.write(record)
        before = {b.name: b.generation for b in bucket.list_blobs(prefix="bounded/")}
        uploader.send()
        after = {b.name: (b.generation, b.size) for b in bucket.list_blobs(prefix="bounded/")}
        sent += sum(size for name, (generation, size) in after.items() if before.get(name) != generation)
    uploader.close()
    # 10 kB written: the plain way sends 505 kB, a piece of ten records sends 55 at most to carry 10.
    assert sent <= 5.5 * 100 * len(record)
    assert sum(len(c) for c in contents(bucket, "bounded/").values()) == 100 * len(record)


def test_a_record_half_written_waits_for_its_other_half() -> None:
    record = (10).to_bytes(8, "little") + bytes(4 + 10 + 4)
    assert whole_records(record * 2 + record[:20], 10**6) == 2 * len(record)
    assert whole_records(record * 5, 2 * len(record) + 1) == 2 * len(record)
    assert whole_records(record, 1) == len(record)  # one record larger than a piece is a piece
    assert whole_records(b"", 1) == 0


def test_a_board_on_gs_arrives_there(bucket: storage.Bucket) -> None:
    board = TensorBoard(f"gs://{BUCKET}/board", active=True)
    board.scalars(1, {"train/loss": 0.5})
    board.close()
    (content,) = contents(bucket, "board/").values()
    assert b"train/loss" in content


def test_a_bucket_that_cannot_be_reached_costs_no_training(
    bucket: storage.Bucket, caplog: pytest.LogCaptureFixture
) -> None:
    uploader = Uploader("gs://no-such-bucket/x", interval_seconds=0.05)
    (uploader.folder / "events").write_bytes((4).to_bytes(8, "little") + bytes(12))
    deadline = time.monotonic() + 30
    while "not uploaded" not in caplog.text and time.monotonic() < deadline:
        time.sleep(0.05)
    uploader.close()
    assert "TensorBoard events not uploaded to gs://no-such-bucket" in caplog.text


def test_only_process_0_writes_events(tmp_path: Path) -> None:
    board = TensorBoard(str(tmp_path / "tb"), active=False)
    board.scalars(1, {"a": 1.0})
    board.close()
    assert not (tmp_path / "tb").exists()


@pytest.mark.parametrize(("n", "size"), [(1, (76, 64)), (5, (2 * 76, 3 * 64)), (9, (3 * 76, 3 * 64))])
def test_grid_is_as_square_as_can_be(n: int, size: tuple[int, int]) -> None:
    images = np.full((n, 8, 8, 3), 200, np.uint8)
    sheet = captioned_grid(images, ["7→1"] * n)
    assert sheet.shape == (*size, 3)
    assert (sheet[:64, :64] == 200).all()
    assert (sheet[64:76, :64] < 100).any()  # the caption
