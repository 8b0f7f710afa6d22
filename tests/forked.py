"""Commands in processes of their own, forked from a server that has imported torch and diffusers already: a
run that is to be signalled or killed starts in a fraction of a second."""

import multiprocessing
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

ROOT = Path(__file__).parent.parent
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["train", "sample", "opd.mini.rewards"])


@dataclass
class Command:
    process: ForkServerProcess
    log: Path

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def ended(self, seconds: float = 400.0) -> int:
        """Its exit status, negative for a signal; it is killed, and None, if it takes longer."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.signal(signal.SIGKILL)
            self.process.join()
            return None
        return self.process.exitcode

    def printed(self) -> str:
        return self.log.read_text()


def train(log: Path, arguments: list[str], **environment: str) -> Command:
    """`python train.py ARGUMENTS`, its output in the file `log`."""
    process = SERVER.Process(target=_train, args=(log, arguments, environment))
    process.start()
    return Command(process, log)


def ranks(folder: Path, count: int, arguments: list[str]) -> list[Command]:
    """`train.py` on several ranks without a launcher; outputs in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "localhost"}
        shared["MASTER_PORT"] = str(free.getsockname()[1])
    return [
        train(folder / f"rank{rank}.log", arguments, RANK=str(rank), LOCAL_RANK=str(rank), **shared)
        for rank in range(count)
    ]


def wait_for(condition, seconds: float = 300.0) -> None:
    """Poll until `condition()` holds; AssertionError if it never does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def _train(log: Path, arguments: list[str], environment: dict[str, str]) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.argv = ["train.py", *arguments]
    sys.modules["matplotlib.figure"] = None  # to draw the curves would take longer than the run
    import torch

    import train

    torch.set_num_threads(1)
    train.main()
