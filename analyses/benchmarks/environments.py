"""Where the peers run: environments beside ours, in which mambascope's packages are found by PYTHONPATH.

`make bench-peers` makes them under .venv-peers (or where BENCH_PEERS points), one from peers.txt and one from lens.txt,
since MambaLens needs an older TransformerLens. Ours and the peers of an environment run in one process, in the same
rounds, so every ratio is within one process. Without them the work runs here, with the peers that are here.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from minimal_mamba.provenance import provenance

from .peers import ENVIRONMENTS, KINDS

ROOT = Path(__file__).parents[2]


def pythons() -> dict[str, str]:
    """The interpreters of the environments that are here; else "here", this one."""
    folder = Path(os.environ.get("BENCH_PEERS", ROOT / ".venv-peers"))
    found = {name: folder / name / "bin" / "python" for name in ENVIRONMENTS}
    return {name: str(path) for name, path in found.items() if path.exists()} or {"here": sys.executable}


def tried(environment: str) -> tuple[str, ...]:
    """The peers that are tried in an environment."""
    return ENVIRONMENTS.get(environment, tuple(KINDS))


def variables(threads: int = 1) -> dict[str, str]:
    """The environment of a process that measures: threads (0: all), and large blocks given back when freed."""
    n = str(threads or os.cpu_count() or 1)
    return os.environ | {
        "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": n, "MKL_NUM_THREADS": n, "MALLOC_MMAP_THRESHOLD_": "65536",
        "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled",
    }  # fmt: skip


def spawn(python: str, arguments: list[str], threads: int = 1) -> None:
    """Run a command of the benchmarks in another interpreter.

    Raises:
        RuntimeError: it failed; what it said is above.
    """
    command = [python, "-W", "ignore", "-m", "analyses.benchmarks", *arguments]
    env = variables(threads)
    if arguments[0] != "memory-of":  # the block size is for memory only: it makes allocation dear
        env.pop("MALLOC_MMAP_THRESHOLD_")
    if subprocess.run(command, cwd=ROOT, env=env).returncode:
        raise RuntimeError(f"failed: {' '.join(command)}")


def done(path: Path) -> bool:
    """Whether a result is there from the code as it is now: the same commit."""
    if not path.exists():
        return False
    made = json.loads(path.read_text())["provenance"]["commit"]
    return made.removesuffix("+changes") == str(provenance()["commit"]).removesuffix("+changes")
