"""The end of a worker process, whose exit code another thread waits for."""

import subprocess
import threading

from launcher.host.process import kill_group


def test_a_process_can_end_while_it_is_killed():
    for _ in range(
        20
    ):  # each ends between the question and the signal, unless the threads take turns by chance
        process = subprocess.Popen(["sleep", "60"], start_new_session=True)
        waiter = threading.Thread(target=process.wait)
        waiter.start()
        while waiter.is_alive():
            kill_group(process)
        assert process.returncode == -9


def test_children_are_killed_with_their_parent():
    command = ["sh", "-c", "sleep 600 & echo started; wait"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == b"started\n"
    kill_group(process)
    process.communicate(timeout=60)  # the pipe ends with the last process that holds it
