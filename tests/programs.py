"""Run Python programs in new processes that start quickly: they are forked from one that has imported torch.

Starting Python and importing torch takes seconds, which few tests are about. timm and this package are not imported
beforehand: a program does that itself, as it would anywhere. Its exit code, signals, process group, files and
termination are those of any Python process.
"""
import atexit
import contextlib
import functools
import importlib
import json
import multiprocessing
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

# third-party modules that timm and this package import
LIBRARIES = (
    'torch', 'torchvision', 'huggingface_hub.hf_api', 'safetensors.torch', 'yaml', 'tqdm', 'torch.distributed.run',
    'torch.utils.tensorboard', 'matplotlib.figure', 'matplotlib.backends.backend_agg', 'scipy.stats')


class Program:
    """Like `subprocess.Popen` for `python` with these arguments: `-m MODULE ...`, `-c CODE ...` or `SCRIPT ...`.

    Unless file descriptors are given, stdout is read as text through a pipe, and stderr through a file, which cannot
    fill up.
    """

    def __init__(self, arguments, *, cwd=None, env=None, stdout=None, stderr=None, start_new_session=False):
        self.arguments, self.returncode = arguments, None
        self._connection, theirs = socket.socketpair()
        reading, writing = os.pipe()
        self.stdout, self._errors = open(reading), tempfile.TemporaryFile()
        request = {
            'arguments': [os.fspath(argument) for argument in arguments], 'cwd': os.fspath(cwd or os.getcwd()),
            'env': dict(os.environ if env is None else env), 'start_new_session': start_new_session}
        self._connection.sendall(f'{json.dumps(request)}\n'.encode())
        files = [theirs.fileno(), writing if stdout is None else stdout,
                 self._errors.fileno() if stderr is None else stderr]
        socket.send_fds(_server(), [b'.'], files)
        theirs.close()
        os.close(writing)
        self._answers = self._connection.makefile('rb', buffering=0)
        self.pid = int(self._answers.readline())

    def poll(self):
        """The exit code, or the negated signal number; None while it runs."""
        if self.returncode is None and select.select([self._connection], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self):
        """Wait until it has ended, and return the same."""
        if self.returncode is None:
            self.returncode = int(self._answers.readline())
        return self.returncode

    @functools.cached_property
    def errors(self):
        """What it wrote to stderr, once it has ended."""
        self.wait()
        with self._errors:
            self._errors.seek(0)
            return self._errors.read().decode(errors='surrogateescape')

    def finish(self):
        """Read its output until it ends."""
        out = self.stdout.read()
        return subprocess.CompletedProcess(self.arguments, self.wait(), out, self.errors)

    def send_signal(self, number):
        """Send it a signal, if it has not ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stdout.close()
        self.wait()
        self._answers.close()
        self._connection.close()


def run(arguments, check=False, stdout=None, **options):
    """Like `subprocess.run` for `python` with these arguments, capturing text."""
    # a file, since the children of a killed process would keep a pipe open
    with tempfile.TemporaryFile('w+') as out:
        with Program(arguments, stdout=out.fileno() if stdout is None else stdout, **options) as program:
            program.wait()
        out.seek(0)
        done = subprocess.CompletedProcess(arguments, program.returncode, out.read(), program.errors)
    if check:
        assert done.returncode == 0, done.stderr
    return done


def run_ranks(count, arguments, **options):
    """Like `run` for several processes that find one another by the variables that torchrun sets; returns a list."""
    with contextlib.ExitStack() as stack, socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        meeting = {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(free.getsockname()[1])}
        free.close()
        sizes = {'WORLD_SIZE': str(count), 'LOCAL_WORLD_SIZE': str(count)}
        programs = [stack.enter_context(Program(
            arguments, env={**os.environ, **meeting, **sizes, 'RANK': str(rank), 'LOCAL_RANK': str(rank)}, **options))
            for rank in range(count)]
        return [program.finish() for program in programs]


@functools.cache
def _server():
    """The socket to the process that others are forked from, which ends when this socket is closed."""
    ours, theirs = socket.socketpair()
    subprocess.Popen([sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()],
                     stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    theirs.close()
    return ours


def _serve(control):
    """Fork a process for each request, and return in that process with the request and its stdout and stderr."""
    while True:
        message, files, *_ = socket.recv_fds(control, 1, 3)
        if not message:
            os._exit(0)
        if not os.fork():
            break
        for file in files:
            os.close(file)
    control.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with socket.socket(fileno=files.pop(0)) as connection, connection.makefile() as requests:
        request = json.loads(requests.readline())
        pid = os.fork()
        if pid:
            for file in files:
                os.close(file)
            connection.sendall(f'{pid}\n'.encode())
            connection.sendall(f'{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n'.encode())
            os._exit(0)
    return request, files


def _become(request, files):
    """Set up this process as `python` would with the request's arguments."""
    for number, file in enumerate(files, 1):
        os.dup2(file, number)
        os.close(file)
    sys.stdout = sys.__stdout__ = open(1, 'w', closefd=False)
    sys.stderr = sys.__stderr__ = open(2, 'w', buffering=1, errors='backslashreplace', closefd=False)
    if request['start_new_session']:
        os.setsid()
    os.chdir(request['cwd'])
    multiprocessing.process.ORIGINAL_DIR = os.getcwd()  # where processes that it spawns look for the script
    inherited = os.environ.get('PYTHONPATH', '')
    os.environ.clear()
    os.environ.update(request['env'])
    kind, *_ = sys.argv = request['arguments']
    first = {'-c': '', '-m': os.getcwd()}.get(kind, str(Path(kind).absolute().parent))
    path = os.environ.get('PYTHONPATH', '')
    sys.path[:1] = [first, *(path.split(os.pathsep) if path != inherited else [])]


def _end(error):
    """End as Python does, but without tearing down all modules, which takes a second in a forked process."""
    code = 0
    if isinstance(error, SystemExit):
        code = error.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    elif error is not None:
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = 120
    if isinstance(error, KeyboardInterrupt):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code & 0xFF)


if __name__ == '__main__':
    for _name in LIBRARIES:
        try:
            importlib.import_module(_name)
        except ModuleNotFoundError:  # it belongs to an extra
            pass
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    _become(*_serve(socket.socket(fileno=int(sys.argv[1]))))
    try:
        if sys.argv[0] == '-m':
            runpy._run_module_as_main(sys.argv.pop(1))
        elif sys.argv[0] == '-c':
            del __file__
            exec(compile(sys.argv.pop(1), '<string>', 'exec'))
        else:
            __file__ = sys.argv[0]
            exec(compile(Path(__file__).read_text(), __file__, 'exec'))
    except BaseException as _error:
        _end(_error)
    _end(None)
