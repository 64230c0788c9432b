"""`python -m torture`: torture, check, and tell; exit code 1 if anything was not as it must be."""

from __future__ import annotations

import argparse
import random
import secrets
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from bgsupervisor.addresses import masked
from torture import interrupts, invariants
from torture.arena import Arena
from torture.course import Plan, torture

if TYPE_CHECKING:
    from torture.invariants import Evidence


def main() -> int:
    """Run one torture."""
    interrupts.heed()
    options = _options()
    seed = options.seed or secrets.token_hex(4)
    replay = (
        f"python -m torture --seed {seed} --seconds {options.seconds:g} --tasks {options.tasks} --rate {options.rate:g}"
        + (f" --database {masked(options.database)}" if options.database else "")
    )
    configuration = _configuration(seed)
    print(f"seed {seed}; the same decisions again: {replay}")
    print(", ".join(f"{key} {value}" for key, value in configuration.items()), flush=True)
    folder = Path(tempfile.mkdtemp(prefix="torture-"))
    plan = Plan(
        seed=seed,
        seconds=options.seconds,
        tasks=options.tasks,
        rate=options.rate,
        slack=options.slack,
        slots=int(configuration["slots"]),
    )
    arena = Arena(folder, configuration, options.database)
    known = None
    try:
        known = torture(arena, plan)
    except KeyboardInterrupt as interrupt:
        print(f"{interrupt}: ending the run, killing its processes", file=sys.stderr)
    finally:
        arena.end()
    if known is None:
        shutil.rmtree(folder)
        return interrupts.CODE
    found = invariants.violations(known)
    tell(known, found)
    if found or options.keep:
        print(f"kept in {folder}; replay: {replay}")
    else:
        shutil.rmtree(folder)
    return 1 if found else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m torture", description="Torture bgsupervisor, check its promises.")
    parser.add_argument("--seed", help="the same decisions as another run; the machine's timing is never the same")
    parser.add_argument("--seconds", type=float, default=30, help="how long chaos reigns (default %(default)s)")
    parser.add_argument("--tasks", type=int, default=0, help="go on until so many tasks were requested")
    parser.add_argument("--rate", type=float, default=5, help="deeds of chaos a second (default %(default)s)")
    parser.add_argument("--slack", type=float, default=1, help="promised times are multiplied with it (a busy machine)")
    parser.add_argument("--database", help="the address of an empty one of PostgreSQL; by default a file of SQLite")
    parser.add_argument("--keep", action="store_true", help="keep the folder also if nothing was found")
    return parser.parse_args()


def _configuration(seed: str) -> dict[str, float]:
    chance = random.Random(f"{seed}/configuration")
    return {
        "slots": chance.choice((4, 8, 16)),
        "spares": chance.choice((0, 2, 4)),
        "reuse": chance.choice((1, 1, 5)),
        "grace_s": 0.5,
        "heartbeat_s": 1.0,
    }


def tell(known: Evidence, found: list[str]) -> None:
    """Print the figures, then what was found."""
    for what, counter in invariants.counts(known).items():
        print(f"{what}: " + ", ".join(f"{name} {count}" for name, count in sorted(counter.items())))
    print(f"attempts begun {len(known.by_attempt)}, adopted {known.adopted}, `run` started {len(known.lives)} times")
    print(f"from death to truth: {invariants.latency(known)}")
    print(f"the observer was late by at most {known.longest_look_s:.2f} s")
    print(f"violations: {len(found)}")
    for sentence in found:
        print(f"  {sentence}")


if __name__ == "__main__":
    sys.exit(main())
