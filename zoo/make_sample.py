"""Cut the sample of text that ships with the project: `python -m zoo.make_sample CORPUS zoo/sample`.

Permissive sources only, every source in proportion to its size, held-out rows included. Deterministic.
"""

from __future__ import annotations

import json
import lzma
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from zoo.corpus import PARTS, PERMISSIVE

# Text per part, in MB before compression; about 3 MB altogether after it.
MEGABYTES = {"pretrain": 6.0, "chat": 2.0, "translation": 1.2, "math": 1.0, "summarization": 0.5}
HELD_OUT_SHARE = 0.06


def choose(path: Path, megabytes: float, rng: np.random.Generator) -> list[str]:
    """Lines of one part: of each source and split a random share, in file order."""
    groups: dict[tuple[str, bool], list[tuple[int, str]]] = defaultdict(list)
    with lzma.open(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file):
            row: dict[str, Any] = json.loads(line)
            if row["source"] in PERMISSIVE:
                groups[row["source"], row["split"] == "train"].append((number, line))
    sizes: dict[bool, int] = defaultdict(int)
    for (_, in_train), lines in groups.items():
        sizes[in_train] += sum(len(line) for _, line in lines)
    kept: list[tuple[int, str]] = []
    for (_, in_train), lines in sorted(groups.items()):
        share = megabytes * 1e6 * (1 - HELD_OUT_SHARE if in_train else HELD_OUT_SHARE) / sizes[in_train]
        count = min(len(lines), max(1, round(share * len(lines))))
        kept += [lines[i] for i in rng.permutation(len(lines))[:count]]
    return [line for _, line in sorted(kept)]


def main() -> int:
    if len(sys.argv) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    corpus, out = Path(sys.argv[1]), Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        lines = choose(corpus / f"{part}.jsonl.xz", MEGABYTES[part], np.random.default_rng(0))
        temporary = out / f"{part}.jsonl.xz.part"
        with lzma.open(temporary, "wt", encoding="utf-8", preset=9 | lzma.PRESET_EXTREME) as file:
            file.writelines(lines)
        temporary.replace(out / f"{part}.jsonl.xz")
        print(f"{part}: {len(lines):,} rows, {(out / f'{part}.jsonl.xz').stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
