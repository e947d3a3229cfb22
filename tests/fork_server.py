"""A process that has imported what programs need, and runs each of them in a fork of itself.

    python -m tests.fork_server MODULE ...

It reads an order a line, as JSON, and answers each with a line: ``{"run": ...}`` starts a program
and is answered by its process number, ``{"wait": number}`` by its exit status once it has ended.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import Any, NamedTuple


class Program(NamedTuple):
    """What ``python ARGUMENTS`` would run.

    Attributes:
        arguments: ``-c`` and code, ``-m`` and a module, or a script; then the program's own.
        environment: all variables.
        folder: where it runs.
        output: the file that gets what it prints; likewise ``errors``.
        seconds: after which it is ended.
    """

    arguments: list[str]
    environment: dict[str, str]
    folder: str
    output: str
    errors: str
    seconds: int

    def run(self) -> None:
        """Makes this process the program."""
        signal.alarm(self.seconds)
        for file, stream in ((self.output, 1), (self.errors, 2)):
            opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(opened, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(self.folder)
        os.environ.clear()
        os.environ.update(self.environment)
        if "OMP_NUM_THREADS" in self.environment:  # it was read when torch was imported
            import torch

            torch.set_num_threads(int(self.environment["OMP_NUM_THREADS"]))
        kind, *rest = self.arguments
        if kind == "-m":
            sys.argv = rest
            sys.path[0] = self.folder
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
            return
        if kind != "-c":
            sys.argv = self.arguments
            sys.path[0] = str(Path(kind).parent)
            runpy.run_path(kind, run_name="__main__")
            return
        code, *rest = rest
        sys.argv = ["-c", *rest]
        sys.path[0] = ""
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(code, "<string>", "exec"), vars(main))


class Server:
    """The server, as the process that starts it sees it."""

    def __init__(self, imported: tuple[str, ...], environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, *imported],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, order: dict[str, Any]) -> Any:
        """The answer to an order."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(order), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())


def _serve(imported: list[str]) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is imported may print
    for name in imported:
        importlib.import_module(name)
    if "torch" in sys.modules:  # whose optimizers import that when they are made, for seconds
        importlib.import_module("torch._dynamo")
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            answer = os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1])
        else:
            answer = os.fork()
            if answer == 0:
                return Program(**order["run"]).run()
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1:])
