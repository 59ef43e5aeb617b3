"""The results as tables: beside the targets for the terminal, and for the README."""

import json
import math
from itertools import chain
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
TARGETS = {  # work -> at least so many times faster (or smaller) than the best peer; with all threads, than one thread
    "forward S, batch 8, length 256": 4.5,
    "forward S, batch 8, length 1024": 4.5,
    "forward M, batch 8, length 256": 2.2,
    "training step S, batch 16, length 256": 5.0,
    "training step S, batch 16, length 64": 3.0,
    "training step M, batch 16, length 64": 4.0,
    "all states captured S, batch 8, length 128": 2.5,
    "state sweep S, batch 16, length 64": 15.0,
    "residual sweep S, batch 16, length 64": 15.0,
    "decoding S, 64 + 64 tokens": 5.0,
    "decoding M, 64 + 64 tokens": 1.4,
    "memory, forward S, batch 8, length 256": 5.0,
}
THREADS = 1.7  # all threads over one


def load(folder: Path = RESULTS) -> dict[str, list[dict[str, Any]]]:
    """work -> its results, one an environment, in the order of the table of work."""
    from .cpu import PIECES

    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted((folder / "cpu").glob("*.json"), reverse=True):  # "peers" before "lens"
        made = json.loads(path.read_text())
        found.setdefault(made["work"], []).append(made)
    order = [*PIECES, *(f"memory, {name}" for name in PIECES)]
    return dict(sorted(found.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))


def summary(several: list[dict[str, Any]]) -> dict[str, Any]:
    """One work over the environments: ours, the best peer of any, and the least ratio to it of each backend."""
    unit = "mb" if "mb" in several[0] else "seconds"
    ratio: dict[str, tuple[float, str]] = {}
    for r in several:
        for name, times in r["ratio"].items():
            ratio[name] = min(
                ratio.get(name, (math.inf, "")), (times, r["least_peer" if unit == "mb" else "fastest_peer"])
            )
    values = {n: v if unit == "mb" else v["median"] for r in reversed(several) for n, v in r[unit].items()}
    tried = {n for r in several for n in r[unit]}
    left = {n: why for r in several for n, why in (r["left_out"] | r.get("refused", {})).items() if n not in tried}
    bound = min((r["floor"]["floor_s"] for r in several if "floor" in r), default=None)
    return {"unit": unit, "values": values, "ratio": ratio, "left_out": left, "floor": bound}


def best(several: list[dict[str, Any]]) -> tuple[str, float, str]:
    """Our fastest backend, its ratio to the best peer, and that peer's name."""
    ratio = summary(several)["ratio"]
    name = max(ratio, key=lambda n: ratio[n][0])
    return name, *ratio[name]


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Everything, as lines of text: median and spread of each, its ratio to ours, errors, who is left out and why."""
    lines = []
    for work, several in results.items():
        for r in several:
            lines.append(f"\n{work}  [{r['environment']}, {r['threads']} threads]")
            for name, value in r.get("mb", {}).items():
                lines.append(f"  {name:22} {value:9.1f} MB")
            for name, t in r.get("seconds", {}).items():
                ours = max(r["ratio"], key=r["ratio"].__getitem__, default=None)
                ratio = f"{t['median'] / r['seconds'][ours]['median']:6.2f}x" if ours else ""
                median, q1, q3 = (1e3 * t[k] for k in ("median", "q1", "q3"))
                error = f"error {r['error_against_float64'][name]:.0e}"
                lines.append(f"  {name:22} {median:10.1f} ms [{q1:.1f} .. {q3:.1f}, n={t['rounds']}] {ratio}  {error}")
            if "floor" in r:
                lines.append(f"  {'floor':22} {r['floor']['floor_s'] * 1e3:10.1f} ms")
                lines.append("  refused by the check: " + ", ".join(f"{n} {e:.2f}" for n, e in r["controls"].items()))
            lines += [f"  left out: {n}: {why}" for n, why in (r["left_out"] | r.get("refused", {})).items()]
    return "\n".join(lines)


def targets(results: dict[str, list[dict[str, Any]]]) -> str:
    """Target, reached, and what the floor would allow, of each promised number."""
    lines = [f"{'work':46} {'target':>7} {'reached':>8} {'floor':>7}  by, beside"]
    for work, least in TARGETS.items():
        if work not in results or not summary(results[work])["ratio"]:
            lines.append(f"{work:46} {least:6.1f}x        -")
            continue
        name, reached, peer = best(results[work])
        s = summary(results[work])
        bound = f"{reached * s['values'][name] / s['floor']:6.1f}x" if s["floor"] else "      -"
        mark = "" if reached >= least else "  MISSED"
        lines.append(f"{work:46} {least:6.1f}x {reached:7.1f}x {bound}  {name}, {peer}{mark}")
    for work in [w for w in results if w.endswith("all threads")]:
        for name, reached in speedups(results[work]).items():
            mark = "" if reached >= THREADS else "  MISSED"
            lines.append(f"{work:46} {THREADS:6.1f}x {reached:7.1f}x       -  {name}, one thread{mark}")
    return "\n".join(lines)


def speedups(several: list[dict[str, Any]]) -> dict[str, float]:
    """Of each backend: its time on one thread over that on all, measured in turn."""
    found = {n: t for r in several for n, t in r.get("threads_over_one", {}).items()}
    return {n: t["one"]["median"] / t["all"]["median"] for n, t in found.items()}


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return (
        f"{seconds:.1f} s"
        if seconds >= 1
        else f"{seconds * 1e3:.0f} ms"
        if seconds >= 0.01
        else f"{seconds * 1e3:.1f} ms"
    )


def markdown(results: dict[str, list[dict[str, Any]]]) -> str:
    """The README's tables: time beside the fastest peer and the floor, then memory beside the least peer."""
    backends = [n for n in ("mambascope torch", "mambascope compiled")
                if any(n in summary(s)["values"] for s in results.values())]  # fmt: skip
    heads = [n.removeprefix("mambascope ") for n in backends]
    lines = ["| | " + " | ".join(f"`{h}`" for h in heads) + " | fastest peer | takes longer | floor |"]
    lines.append("|---|" + "---|" * (len(backends) + 3))
    memory = ["| peak memory | " + " | ".join(f"`{h}`" for h in heads) + " | least peer | takes more |"]
    memory.append("|---|" + "---|" * (len(backends) + 2))
    for work, several in results.items():
        s = summary(several)
        if not s["ratio"]:
            continue
        peer, values = best(several)[2], s["values"]
        times = " / ".join(f"{s['ratio'][n][0]:.1f}x" if n in s["ratio"] else "-" for n in backends)
        if s["unit"] == "mb":
            shown = [f"{values[n]:.0f} MB" if n in values else "-" for n in backends]
            memory.append(
                f"| {work.removeprefix('memory, ')} | {' | '.join(shown)} | {peer}, {values[peer]:.0f} MB | {times} |"
            )
        else:
            shown = [_time(values.get(n)) for n in backends]
            lines.append(
                f"| {work} | {' | '.join(shown)} | {peer}, {_time(values[peer])} | {times} | {_time(s['floor'])} |"
            )
    threads = [
        "| all threads, over one | " + " | ".join(f"`{h}`" for h in heads) + " |",
        "|---|" + "---|" * len(backends),
    ]
    for work, several in results.items():
        if gained := speedups(several):
            shown = [f"{gained[n]:.2f}x" if n in gained else "-" for n in backends]
            threads.append(f"| {work.removesuffix(', all threads')} | {' | '.join(shown)} |")
    more = [["", *made] for made in (threads, memory) if len(made) > 2]
    return "\n".join(chain(lines, *more))
