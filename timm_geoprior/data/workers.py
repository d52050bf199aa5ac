"""The processes that read images for another one."""
import os
import signal
import sys
import threading

__all__ = ['init_worker']


def init_worker(worker: object) -> None:
    """Leave Ctrl-C and SIGTERM to the parent process, which saves or ends in order.

    SLURM, systemd, `timeout` and a terminal send them to all processes of a group at once. A worker that died first
    would end its parent with a traceback. Only a SIGTERM of the parent itself ends a worker.

    Args:
        worker: Its number, as `DataLoader(worker_init_fn=...)` gives it; not used.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == 'linux':  # elsewhere Python does not tell who has sent a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # also in all threads that start from here on
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)  # at once, as torch's own handler does
