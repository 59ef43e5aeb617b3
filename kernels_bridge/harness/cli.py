"""The commands `check`, `bisect`, `record`. Exit status: 0 all within bounds, 1 something is not, 2 no verdict."""

import contextlib
import math
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer

from minimal_mamba import Mamba
from minimal_mamba.errors import InputError, MambascopeError

from ..backends import resolve
from ..fused import golden
from .bisect import bisect as bisect_two
from .check import KINDS, exact_products, precision
from .check import check as check_target
from .draw import SIZES, draw_model
from .rows import short, table
from .targets import NAMES
from .targets import target as make

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
# of 130m: gradients by all states hold some ten times what float64 states take, 53 GB at 512 tokens
LARGE_LENGTHS = {"cuda": [128, 512], "cpu": [16, 33]}
Weights = Annotated[Path | None, typer.Option("--model", help="a checkpoint folder; without it weights are drawn")]
Device = Annotated[str, typer.Option(help="cpu or cuda; cuda where there is one, if not given")]
Type = Annotated[str, typer.Option(help=f"one of {', '.join(DTYPES)}")]
Size = Annotated[
    str,
    typer.Option(
        help="of drawn weights: small (2 layers, d_model 64), odd (every choice other than small's: biases, LayerNorm, "
        "untied head, sizes without a power of two), falcon (small, with FalconMamba's norms) or 130m (24 layers, "
        "d_model 768)"
    ),
]
Seed = Annotated[int, typer.Option(help="of drawn weights, tokens and edits")]


def device_of(name: str) -> torch.device:
    """The device of this name; for none CUDA where it is here, else the CPU."""
    try:
        return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise InputError(f"--device {name} is none that torch knows: cpu, cuda, cuda:1, ...") from None


def _device(name: str) -> torch.device:
    device = device_of(name)
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {name}: the truth is in float64, which cpu and cuda have.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda, but torch sees no CUDA device here. Use --device cpu.")
    return device


def _weights(path: Path | None, size: str, seed: int, dtype: str, device: str) -> Mamba:
    if dtype not in DTYPES:
        raise InputError(f"--dtype {dtype} is none of {', '.join(DTYPES)}.")
    if size not in SIZES:
        raise InputError(f"--size {size} is none of {', '.join(SIZES)}.")
    place = _device(device)
    model = Mamba.from_pretrained(path) if path else draw_model(SIZES[size], seed)
    return model.to(place, DTYPES[dtype])


@contextlib.contextmanager
def judged() -> Iterator[None]:
    """Whatever ends a command without a verdict, ends it with status 2: 1 says that something is out of its bound."""
    try:
        yield
    except (MambascopeError, OSError) as error:
        typer.echo(f"no verdict: {error}" if "no verdict" not in str(error) else str(error), err=True)
    except KeyboardInterrupt:
        typer.echo("no verdict: interrupted.", err=True)
    except Exception as error:  # of the target's own, most likely
        traceback.print_exc()
        typer.echo(f"no verdict: {type(error).__name__}: {error}", err=True)
    else:
        return
    raise typer.Exit(2)


def check(
    target: Annotated[str, typer.Option(help=f"what to check: {', '.join(NAMES)}")],
    model: Weights = None,
    device: Device = "",
    dtype: Type = "float32",
    size: Size = "small",
    lengths: Annotated[str, typer.Option(help="of the sequences, as 1,17,128; else a list that suits the device")] = "",
    kinds: Annotated[str, typer.Option(help=f"of {', '.join(KINDS)}; else all that the target can take")] = "",
    batch: Annotated[int, typer.Option(help="rows at least")] = 2,
    seed: Seed = 0,
    json: Annotated[
        Path | None, typer.Option(help="keep everything here, after every case; goes on from what is there")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="begin again, whatever --json holds")] = False,
) -> None:
    """Hold an implementation against the readable model in float64, quantity by quantity, clean and under edits."""
    with judged():
        exact_products()
        weights = _weights(model, size, seed, dtype, device)
        if lengths and not all(part.strip().isdecimal() for part in lengths.split(",")):
            raise InputError(f"--lengths {lengths}: give whole numbers between commas, as in 1,17,128.")
        chosen = [int(part) for part in lengths.split(",")] if lengths else None
        if chosen is None and size == "130m" and model is None:
            chosen = LARGE_LENGTHS[weights.device.type]
        report = check_target(
            make(target, weights), weights, kinds=[k.strip() for k in kinds.split(",")] if kinds else None,
            lengths=chosen, batch=batch, seed=seed, path=json, fresh=fresh,
        )  # fmt: skip
    typer.echo(table(report.rows))
    typer.echo("precision: " + ", ".join(f"{k}={v}" for k, v in precision().items()))
    typer.echo("controls, change of the logits: " + ", ".join(f"{k} {v:.0%}" for k, v in report.controls.items()))
    if report.unseen:
        typer.echo(f"not seen from outside this target: {', '.join(report.unseen)}")
    if report.mute:
        counts = ", ".join(f"{n} of {kind}" for kind, n in report.mute.items())
        typer.echo(f"rows that say nothing, as in {dtype} the readable model errs by half or more there: {counts}")
    failed = sum(not r.passed for r in report.rows)
    telling = len(report.rows) - sum(report.mute.values())
    if report.passed:
        typer.echo(
            f"PASS: {target} agrees with the readable model in all {telling} rows"
            + ("." if not report.mute else " that say something.")
        )
        return
    if not failed:
        typer.echo(f"no verdict: in {dtype} no row says anything.", err=True)
        raise typer.Exit(2)
    if report.first is None:
        typer.echo(
            f"FAIL: {failed} of {len(report.rows)} rows; every layer by itself agrees, fed the reference's input and "
            "run line by line."
        )
    else:
        typer.echo(f"FAIL: {failed} of {len(report.rows)} rows. The first site to part is {report.first}.")
    raise typer.Exit(1)


def bisect(
    a: Annotated[str, typer.Argument(help=f"{', '.join(NAMES)}, or module:function that returns a module")],
    b: Annotated[str, typer.Argument(help="the other")],
    model: Weights = None,
    device: Device = "",
    dtype: Type = "float32",
    size: Size = "small",
    length: Annotated[int, typer.Option(min=1, help="tokens in a row")] = 17,
    seed: Seed = 0,
) -> None:
    """Compare any two implementations of the same weights and name the first site at which they part."""
    with judged():
        exact_products()
        found = bisect_two(a, b, model=_weights(model, size, seed, dtype, device), length=length, seed=seed)
    typer.echo(str(found))
    if found.parted:
        raise typer.Exit(1)


def record(
    path: Annotated[Path, typer.Argument(help="a safetensors file of less than 3 MB, written whole or not at all")],
) -> None:
    """Write what mamba-ssm's CUDA kernels give on this GPU, and hold it against the readable operations in float64."""
    with judged():
        if not torch.cuda.is_available():
            raise InputError("torch sees no CUDA device here, on which the kernels could run.")
        resolve("fused", "cuda")
        exact_products()
        golden.record(path)
        found = list(golden.replay(path))
    rows: dict[str, list[tuple[float, float]]] = {}
    for case, quantity, error, bound in found:
        row = f"{case.kind:<9} {str(case.dtype).removeprefix('torch.'):<8} {quantity:<8}"
        rows.setdefault(row, []).append((error, bound))
    for row, several in rows.items():
        error, bound = max(several, key=lambda held: (math.isnan(held[0]), held))  # NaN is the worst
        typer.echo(f"{row} {short(error)} {short(bound)}  {'pass' if error <= bound else 'FAIL'}")
    wrong = sum(not error <= bound for *_, error, bound in found)
    typer.echo(
        f"{'FAIL' if wrong else 'PASS'}: {wrong} of {len(found)} outputs are out of their bound; {path} holds all."
    )
    if wrong:
        raise typer.Exit(1)
