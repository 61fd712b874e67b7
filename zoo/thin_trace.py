"""A smaller copy of a trace: `python -m zoo.thin_trace IN OUT --sequences 200`, without routing weights.

For traces that are committed: token ids and expert ids are what predictors, policies and the simulator read.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from expertflow.trace import TraceWriter, read_trace


def thin(source: Path, target: Path, num_sequences: int, seed: int = 0) -> int:
    """Copy up to num_sequences sequences, whole prompts at a time, without weights. Returns how many.

    Prompts are chosen by `seed`; the split stays as it was. Raises ValueError when `target` is there already.
    """
    if target.exists():
        raise ValueError(f"{target} exists; give another folder, or delete it")
    trace = read_trace(source, weights=False)
    prompts = sorted({(s.split, s.prompt) for s in trace})
    random.Random(seed).shuffle(prompts)
    chosen: list[int] = []
    for _, prompt in prompts:
        runs = [index for index, s in enumerate(trace) if s.prompt == prompt]
        if len(chosen) + len(runs) > num_sequences:
            break
        chosen += runs
    with TraceWriter(target, trace.meta) as writer:
        for index in sorted(chosen):
            writer.append(replace(trace[index], source_weights_SLK=None, target_weights_TLK=None))
    return len(chosen)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m zoo.thin_trace", description=__doc__.split("\n", 1)[0])
    parser.add_argument("source", type=Path, metavar="IN")
    parser.add_argument("target", type=Path, metavar="OUT")
    parser.add_argument("--sequences", type=int, default=200, help="at most so many [200]")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of prompts [0]")
    options = parser.parse_args(argv)
    try:
        copied = thin(options.source, options.target, options.sequences, options.seed)
    except (OSError, ValueError) as error:
        print(f"zoo.thin_trace: {error}", file=sys.stderr)
        return 1
    size = sum(path.stat().st_size for path in options.target.iterdir())
    print(f"{options.target}: {copied} sequences, {size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
