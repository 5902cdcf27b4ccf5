"""Programs in processes of their own that begin at once: forked from one that has imported what they would import."""

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
from pathlib import Path

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env

ROOT = Path(__file__).parents[1]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["lrmt.cli", "lrmt.training.recipe", "lrmt.evaluation.run"])


class Program:
    """`python SCRIPT FLAGS…`, or `python -m MODULE FLAGS…` for what is no file, begun; `wait` for it, or `kill` it."""

    def __init__(self, program, *flags, cwd=ROOT, **environment):
        self.output = Path(tempfile.mkstemp(prefix="program-")[1])
        told = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""} | environment
        self.process = SERVER.Process(
            target=_run, args=(str(program), [*map(str, flags)], str(cwd), told, str(self.output))
        )
        self.process.start()

    @property
    def running(self) -> bool:
        return self.process.is_alive()

    def kill(self) -> int:
        self.process.kill()
        return self._end()

    def wait(self, seconds: float = 300) -> int:
        """Its exit code."""
        self.process.join(seconds)
        if self.running:
            self.kill()
            raise TimeoutError(f"more than {seconds} s: {self.stdout[-3000:]} {self.stderr[-3000:]}")
        return self._end()

    def _end(self) -> int:
        self.process.join()
        self.stdout, self.stderr = (Path(f"{self.output}{end}").read_text() for end in ("", ".err"))
        for end in ("", ".err"):
            Path(f"{self.output}{end}").unlink()
        return self.process.exitcode


def _run(program: str, flags: list[str], cwd: str, environment: dict[str, str], output: str) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for number, end in ((1, ""), (2, ".err")):
        file = os.open(output + end, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    sys.argv = [program, *flags]
    if program.endswith(".py"):
        sys.path.insert(0, os.path.dirname(program))
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)


def run(program, *flags, **how) -> Program:
    """The program, run to its end with exit code 0."""
    process = Program(program, *flags, **how)
    assert process.wait() == 0, process.stderr[-6000:]
    return process


def run_ranks(program, *flags, config: str | None = None, seconds: float = 600, **how) -> list[Program]:
    """Two CPU ranks of a program, run to their ends, with what `accelerate launch` would tell them; `config`: a file of ds_configs."""
    port = str(free_port())
    told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    told |= {} if config is None else _told_by(f"ds_configs/{config}.yaml")
    ranks = [Program(program, *flags, RANK=str(r), LOCAL_RANK=str(r), **told, **how) for r in range(2)]
    limit = time.monotonic() + seconds
    while any(rank.running for rank in ranks) and time.monotonic() < limit:
        if any(rank.process.exitcode for rank in ranks):  # the other would wait for it
            time.sleep(2)
            break
        time.sleep(0.05)
    codes = [rank.kill() if rank.running else rank.wait() for rank in ranks]
    assert codes == [0, 0], "".join(rank.stdout[-3000:] + rank.stderr[-6000:] for rank in ranks)
    return ranks


def _told_by(config: str) -> dict[str, str]:
    """What `accelerate launch --config_file` adds to the environment of each rank."""
    args, defaults, mixed = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", str(ROOT / config), "none.py"])
    )
    fields = [*defaults.deepspeed_config, *["mixed_precision"] * mixed]
    args.deepspeed_fields_from_accelerate_config = ",".join(fields)
    environment = prepare_deepspeed_cmd_env(args)[1]
    return {k: v for k, v in environment.items() if os.environ.get(k) != v and k != "PYTHONPATH"}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
