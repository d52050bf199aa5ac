"""The processes that read images for another one."""
import signal

__all__ = ['init_worker']


def init_worker(worker: object) -> None:
    """Leave Ctrl-C and SIGTERM to the parent process, which saves or ends in order.

    SLURM, systemd, `timeout` and a terminal send them to all processes of a group at once. A worker that died first
    would end its parent with a traceback.

    Args:
        worker: Its number, as `DataLoader(worker_init_fn=...)` gives it; not used.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
