"""Processes that work for a run: they last as long as it does."""

import os
import signal
import threading
import time

from torch.utils.data import DataLoader, Dataset

from granvit.data.lengths import start_worker
from granvit.data.parallel import begun


class Bystander(Dataset):
    """Is sent SIGTERM again and again, and not by its parent, as by whoever sends it to a group of processes."""

    def __getitem__(self, item):
        for _ in range(50):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.002)
        return item


def test_a_reading_process_outlives_sigterm():
    """Which `timeout` and schedulers send to all of a run: with its readers gone it could not be saved. Libraries start
    threads in a process as soon as it is forked, as here."""
    library = []

    def start_thread():
        if library:
            threading.Thread(target=time.sleep, args=(60,), daemon=True).start()

    os.register_at_fork(after_in_child=start_thread)  # for good: nothing takes it back
    library.append("is there")
    reads = DataLoader(Bystander(), batch_size=None, sampler=[7], num_workers=1, worker_init_fn=start_worker)
    try:
        assert list(begun(reads)) == [7]
    finally:
        library.clear()
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])  # it is this process's own again
