"""Command lines of the entry scripts: help that reads as a manual, mistakes answered in one line.

    def make_parser():
        parser = cli.Parser(__doc__)
        options.add_common(parser)
        ...

    if __name__ == "__main__":
        ARGS = make_parser().parse_args()  # before PyTorch is imported: --help and mistakes answer at once

    import torch
    ...
    if __name__ == "__main__":
        cli.run(main, ARGS)

Flags are declared `--like_this`; `--like-this` is accepted too. Switches take an optional value: `--hflip` is
`--hflip true`, and `--hflip false` turns off what is on by default. The flags that scripts share: `tools.options`.
"""

import argparse
import contextlib
import errno
import io
import math
import multiprocessing
import os
import re
import shlex
import signal
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from tools import parallel
from tools.errors import Incomplete, UserError

MEMORY_FLAGS = ("batch_size", "image_size", "scales", "images_per_batch", "points_per_batch")
"""A script needs less memory with lower values of these flags."""


STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Stopped(BaseException):
    """This process is asked to end: by Ctrl-C, by the system's SIGTERM, or by SIGUSR1, which Slurm can send before."""


class _ManualFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the layout of the module docstring and shows every default."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=116)

    def _get_help_string(self, action: argparse.Action) -> str:
        hidden = action.default is None or action.default == ""
        return action.help if hidden else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """`argparse` with both spellings of a flag, the docstring as the manual, and one-line errors (exit code 2)."""

    def __init__(self, description: str) -> None:
        super().__init__(prog=_name(), description=description, formatter_class=_ManualFormatter, allow_abbrev=False)
        self.register("type", Path, _path)

    def parse_known_args(self, args=None, namespace=None):
        tokens = sys.argv[1:] if args is None else args
        return super().parse_known_args([_underscored(token) for token in tokens], namespace)

    def error(self, message: str) -> None:
        line = f"{self.prog}: error: {message} (see {self.prog} --help)\n"
        self.exit(2, line if parallel.is_main() else None)  # all processes were given the same flags


def _program() -> list[str]:
    """What follows `python` on the command line: a script; or -m and a module, of which sys.argv has the file only."""
    spec = sys.modules["__main__"].__spec__
    is_module = spec is not None and spec.origin == sys.argv[0]
    return ["-m", spec.name.removesuffix(".__main__")] if is_module else sys.argv[:1]


def _name() -> str:
    """What usage and errors call the program: train_csrm.py, or python -m datasets.verify."""
    program = _program()
    return " ".join(["python", *program]) if program[1:] else Path(program[0]).name


def _underscored(token: str) -> str:
    if not token.startswith("--"):
        return token
    name, equals, value = token[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def run(main: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Call `main(args)`; a `UserError` becomes one line on stderr and exit code 2, and so does full memory.

    Where images were left out, the line says so, and the exit code is 3. Stopped by Ctrl-C (exit code 130), SIGTERM or
    SIGUSR1 (143), it ends with the command that continues.

    Of several processes (`tools.parallel`) only the first prints to stdout. Characters that the terminal's encoding
    lacks, in names of files and classes, are printed as \\ and their numbers.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    quiet = contextlib.nullcontext() if parallel.is_main() else contextlib.redirect_stdout(io.StringIO())
    try:
        with quiet, _stopping_on_signals():
            if line := parallel.left_over():
                print(line)
            main(args)
            print(end="", flush=True)  # also where stdout is closed (None)
        _leave_together()
        return
    except Incomplete as error:
        ending = 3, str(error)
        _leave_together()
    except BrokenPipeError:  # `| head` has read enough; what is still in the buffer has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except BaseException as error:
        ending = _ending(error, args)
        if ending is None:
            raise
    # Out here the exception is gone, and with it the frames that kept a progress bar's line open, or loaders. Helpers
    # that are left were not told to end, and ignore signals: Python would wait for them. PyTorch would raise an error.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for helper in multiprocessing.active_children():
        helper.kill()
    _end(*ending)


def _ending(error: BaseException, args: argparse.Namespace) -> tuple[int, str] | None:
    """Exit code and message of what a user can understand; None for any other error."""
    if isinstance(error, UserError):
        return 2, f"error: {error}"
    if isinstance(error, Stopped):
        command = shlex.join(["python", *_program(), *sys.argv[1:]])
        line = f"stopped by {error}. To continue where it was, run the same command again: {command}"
        return 130 if str(error) == "SIGINT" else 143, line
    if not isinstance(error, (RuntimeError, OSError, MemoryError, ValueError)):
        return None
    if parallel.world_size() > 1:
        from tools import distributed

        if distributed.is_lost_peer(error):
            return 1, "error: another process has ended or hangs. Its error says why; run again to continue."
    words = _in_words(error, args)
    return (2, f"error: {words}") if words else None


def _end(status: int, message: str) -> NoReturn:
    """Print the message on stderr, with the name of the script, and exit."""
    start = "" if parallel.is_main() else "\n"  # another process does not know whether the first has a bar open
    name = f"{_name()} (process {parallel.rank()})" if parallel.world_size() > 1 else _name()
    print(f"{start}{name}: {message}", file=sys.stderr)
    sys.exit(status)


def _leave_together() -> None:
    if parallel.world_size() > 1:
        from tools import distributed  # PyTorch, which takes seconds, and which not every command needs

        distributed.stop()


@contextlib.contextmanager
def _stopping_on_signals() -> Iterator[None]:
    """Raise `Stopped` where the signal finds this process; not for signals that it was started to ignore.

    Python drops an exception that arises in a destructor or a callback of its own, and prints it. So `Stopped` is not
    printed, and raised anew every second for as long as none is on its way, and by every Ctrl-C. Helper processes,
    forked from this one, just end.
    """
    owner, received, show = os.getpid(), [], sys.unraisablehook

    def dropped(fault: Any) -> None:
        if not isinstance(fault.exc_value, Stopped):
            show(fault)

    def stop(number: int, frame: types.FrameType | None) -> None:
        if os.getpid() != owner:
            os._exit(128 + number)
        for each in STOPPING[1:]:  # one is enough; but a user who waits may press Ctrl-C again
            signal.signal(each, signal.SIG_IGN)
        received.append(signal.Signals(number).name)
        signal.setitimer(signal.ITIMER_REAL, 1)
        if len(received) == 1 or number == signal.SIGINT or sys.exc_info()[0] is None:
            raise Stopped(received[0])

    heeded = [number for number in STOPPING if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in (*heeded, signal.SIGALRM)}
    sys.unraisablehook = dropped
    try:
        yield
    except Exception as error:  # PyTorch's writer of files, interrupted, raises an error of its own
        if received:
            raise Stopped(received[0]) from error
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.unraisablehook = show
        for number, handler in before.items():
            signal.signal(number, handler)


def _less_memory(args: argparse.Namespace) -> str:
    flags = " or ".join(f"--{name}" for name in MEMORY_FLAGS if hasattr(args, name))
    hint = ", and raise --accumulate_steps for the same batch" if hasattr(args, "accumulate_steps") else ""
    return f"Lower {flags or '--num_workers'}{hint}."


def _in_words(error: BaseException, args: argparse.Namespace) -> str:
    """What PyTorch's errors about memory, helper processes and batch norm mean; "" for any other."""
    text, workers = str(error), f"--num_workers {getattr(args, 'num_workers', 0)}"
    if isinstance(error, ValueError):
        few = "more than 1 value per channel" in text  # a single image, and batch norm behind global pooling
        return few * "--batch_size 1: the batch norm of this network needs more. Raise it, or pass --mode fix."
    if type(error).__name__ == "OutOfMemoryError":
        return f"the GPU's memory is full. {_less_memory(args)}"
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in text or "can't allocate memory" in text:
        return f"the memory is full. {_less_memory(args)}"
    if re.search(r"allocate shared memory|shared memory \(shm\)|bus error", text, re.IGNORECASE):
        return f"{workers}: /dev/shm is too small for them. Enlarge it (docker: --shm-size 8g), or lower --num_workers."
    if re.search(r"DataLoader worker .* (is killed by signal|exited unexpectedly)|process pool was terminated", text):
        return f"{workers}: a helper process was killed, probably because memory is full. Lower --num_workers."
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.ENOMEM, errno.EAGAIN) and not error.filename:
        return f"{workers}: the helper processes cannot start ({error.strerror}). Make room in /dev/shm, or lower it."
    return ""


def _path(text: str) -> Path:
    """The type of flags that name a file or folder. An empty one, of a variable that is not set, would be `.`."""
    if not text:
        raise argparse.ArgumentTypeError("empty. Is a variable not set?")
    return Path(text)


def boolean(text: str) -> bool:
    """The value of a switch: true/false, yes/no, on/off, 1/0."""
    if text.lower() in ("true", "yes", "on", "1"):
        return True
    if text.lower() in ("false", "no", "off", "0"):
        return False
    raise argparse.ArgumentTypeError(f"'{text}' is neither true nor false")


def switch(default: bool) -> dict[str, object]:
    """What makes a flag read `--name`, `--name true` or `--name false`, for `add_argument`."""
    return {"type": boolean, "nargs": "?", "const": True, "default": default, "metavar": "BOOL"}


def add_switch(group: argparse._ActionsContainer, name: str, default: bool, text: str) -> None:
    """Add a flag that is a `switch`."""
    group.add_argument(name, **switch(default), help=text)


def _number(fault: str, holds: Callable[[float], bool]) -> Callable[[str], float]:
    """The type of flags that take a finite number for which `holds`; the message for others is "NUMBER `fault`"."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"'{text}' is not a number") from error
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"'{text}' is not finite")
        if not holds(value):
            raise argparse.ArgumentTypeError(f"{text} {fault}")
        return value

    return read


def _whole(least: int) -> Callable[[str], int]:
    """The type of flags that take a whole number of at least `least`."""

    def read(text: str) -> int:
        if not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least {least}")
        return int(text)

    return read


positive = _number("is not above 0", lambda value: value > 0)
non_negative = _number("is below 0", lambda value: value >= 0)
probability = _number("is not above 0 and below 1", lambda value: 0 < value < 1)
fraction = _number("is not between 0 and 1", lambda value: 0 <= value <= 1)
positive_int, count = _whole(1), _whole(0)


def fraction_or_auto(text: str) -> float | str:
    """A number in [0, 1], or `auto`."""
    return text if text == "auto" else fraction(text)


def numbers(text: str) -> list[float]:
    """A comma-separated list of positive numbers, such as `0.5,1,1.5,2`."""
    return [positive(part) for part in text.split(",")]
