"""Results on disk: one JSON file for each item, grown part by part, so that a killed run goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.common import commit, machine
from benchmarks.paper.item import Item, Result, Say, Settings, Skipped
from benchmarks.paper.workers import can_share, made_together

FORMAT = "expertflow-paper-1"


def run(
    item: Item,
    settings: Settings,
    say: Say,
    advance: Callable[[int, int], None] = lambda done, of: None,
    jobs: int = 1,
) -> Result:
    """Make what is missing of an item, and keep each part as soon as it is there.

    Parts that were kept under the same conditions are not made again. Raises what a part raises, with all parts
    before it kept. jobs: so many parts at once, each in a process of its own, of an item that can share.
    """
    path = settings.results / item.file_name
    # Through JSON, as what was kept has been.
    conditions = json.loads(json.dumps(item.conditions(settings) | {"quick": settings.quick}))
    result = Result(item.name, item.mode, item.title, conditions, {}, _provenance(settings))
    kept = load(path)
    if kept is not None and kept.conditions == conditions:
        result = replace(result, parts=kept.parts)
        if kept.complete:
            return replace(kept, title=item.title)
    elif kept is not None:
        say(f"{path.name} was made under other conditions; making it anew")
    try:
        parts = list(item.parts(settings))
    except Skipped as reason:
        result = replace(result, skipped=str(reason))
        save(result, path)
        return result
    keys = [part.key for part in parts]
    assert len(keys) == len(set(keys)), f"{item.name}: two parts have one key"
    result = replace(result, parts={key: result.parts[key] for key in keys if key in result.parts})
    missing = [part for part in parts if part.key not in result.parts]
    if jobs > 1 and len(missing) > 1 and can_share(item):
        made = made_together(item, settings, missing, say, jobs)
    else:
        made = ((part.key, part.made(say)) for part in missing)
    advance(len(result.parts), len(parts))
    for key, found in made:
        result = replace(result, parts={**result.parts, key: found})
        save(replace(result, provenance=_provenance(settings)), path)
        advance(len(result.parts), len(parts))
    # In the order of the item, whatever order they were made in.
    result = replace(
        result,
        parts={key: result.parts[key] for key in keys},
        provenance=_provenance(settings),
        complete=True,
    )
    save(result, path)
    return result


def _provenance(settings: Settings) -> dict[str, Any]:
    now = datetime.now(timezone.utc).isoformat(timespec="minutes")
    return {"commit": commit(), "machine": machine(), "seed": settings.seed, "finished": now}


def save(result: Result, path: Path) -> None:
    """All or nothing: a kill leaves the file before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps({"format": FORMAT, **asdict(result)}, indent=1) + "\n")
    partial.rename(path)


def load(path: Path) -> Result | None:
    """What was kept, or None. Raises ValueError for a file that is none of ours."""
    if not path.exists():
        return None
    try:
        said: Any = json.loads(path.read_text())
        if said.pop("format") != FORMAT:
            raise KeyError("format")
        return Result(**said)
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no result of this program ({type(error).__name__}: {error}); delete it"
        ) from None
