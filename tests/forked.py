"""Commands in processes of their own, forked from a server that has imported torch and diffusers already: a
run that is to be signalled or killed, or one of several ranks, starts in a fraction of a second."""

import importlib
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from opd.cli import describe

ROOT = Path(__file__).parent.parent
SERVER = multiprocessing.get_context("forkserver")
# The tiny pipelines import what each command would: diffusers and transformers import a model's code at its
# first use.
TINY = ["tests.tiny", "tests.tiny_families"]
SERVER.set_forkserver_preload(["train", "sample", "opd.mini.rewards", *TINY, "tests.frozen"])


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


def main(module: str, log: Path, arguments: list[str], **environment: str) -> Command:
    """`main()` of a module that takes its arguments from sys.argv, its output in the file `log`."""
    process = SERVER.Process(target=_main, args=(module, log, arguments, environment))
    process.start()
    return Command(process, log)


def command_line(cfg) -> list[str]:
    """The arguments with which train.py has the settings `cfg`, on top of a preset of their stage."""
    preset = {"opd": "mini", "grpo": "mini-text", "nft": "mini-nft-text", "sft": "mini-sft-start"}[cfg.stage]
    words = [word for line in describe(cfg, "").splitlines()[1:] for word in line.split(" ")]
    return [preset, *(word.replace("''", "") for word in words)]


def train(log: Path, arguments: list[str], **environment: str) -> Command:
    return main("train", log, arguments, **environment)


def ranks(
    folder: Path, count: int, arguments: list[str], module: str = "train", **environment: str
) -> list[Command]:
    """`main()` of a module on several ranks without a launcher; outputs in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    shared |= environment
    return [
        main(module, folder / f"rank{rank}.log", arguments, RANK=str(rank), LOCAL_RANK=str(rank), **shared)
        for rank in range(count)
    ]


def free_port() -> int:
    """Below those that the system gives to whoever asks for any, who might come before it is used."""
    while True:
        with socket.socket() as free, suppress(OSError):
            free.bind(("localhost", random.SystemRandom().randrange(10000, 30000)))
            return free.getsockname()[1]


def rows(out: Path) -> list[dict]:
    file = out / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in rows(out)]


def finished(runs: list[Command]) -> str:
    """What rank 0 printed, once all ranks have ended well; AssertionError where one has not."""
    assert [run.ended() for run in runs] == [0] * len(runs), "".join(run.printed()[-3000:] for run in runs)
    return runs[0].printed()


def wait_for(condition, seconds: float = 300.0) -> None:
    """Poll until `condition()` holds; AssertionError if it never does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def _main(module: str, log: Path, arguments: list[str], environment: dict[str, str]) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(environment)
    os.chdir(environment.get("CWD", ROOT))
    sys.argv = [f"{module}.py", *arguments]
    import torch

    from opd.report import plots

    plots.png = lambda figure: b"a picture"  # to render it would take longer than a tiny run
    torch.set_num_threads(1)
    importlib.import_module(module).main()
