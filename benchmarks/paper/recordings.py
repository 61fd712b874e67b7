"""Recorded routes, shared out anew, and the predictors trained on them.

The recordings in zoo/traces hold out eleven prompts, too few for batches of 32 and units of two. Here every third
prompt is held out, among them those that were, and predictors are trained on the others. Both lie in OUT and are made
when missing.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from benchmarks.paper.item import Say, Settings
from expertflow.predictor.model import RoutingPathPredictor
from expertflow.predictor.recordings import load_predictors
from expertflow.predictor.sizes import TrainSettings
from expertflow.predictor.storage import DESCRIPTION
from expertflow.predictor.train import train_predictor
from expertflow.sim.workload import Foretold, foretell
from expertflow.trace import FILE_NAME, Trace, TracedSequence, TraceWriter, read_trace

HELD_OUT = 1 / 3  # of the prompts
DRAFT = "draft"  # what one said of a recording's held-out sequences, in a folder of it (zoo/draft_trace.py)
# Twenty epochs of so little text are minutes; the limit is for slow machines, and the page says when it was met.
TRAINING = TrainSettings(minutes=10.0, epochs=20, threads=1)
UNTRAINED = "online"


@dataclass(frozen=True)
class Recording:
    """Sequences of one model and task. folder: of the copy that is shared out anew."""

    model: str
    task: str
    folder: Path
    trace: Trace

    @property
    def train(self) -> Sequence[TracedSequence]:
        return self.trace.split("train").sequences

    @property
    def test(self) -> Sequence[TracedSequence]:
        return self.trace.split("test").sequences


def recording(settings: Settings, model: str, task: str) -> Recording:
    """Raises ValueError where nothing was recorded."""
    source = settings.traces / model / task
    if not (source / "routes.trace").exists():
        there = sorted(
            str(path.parent.relative_to(settings.traces)) for path in settings.traces.glob("*/*/routes.trace")
        )
        raise ValueError(
            f"{source} has no recording; there is {', '.join(there) or 'none at all'}. Record one with "
            f"`expertflow trace MODEL --dataset {task} -o {source}`"
        )
    folder = settings.out / "recordings" / model / task
    if not folder.exists():
        with _alone(folder):
            if not folder.exists():
                _share_out(source, folder, settings.seed)
    return Recording(model, task, folder, read_trace(folder, weights=False))


def _share_out(source: Path, folder: Path, seed: int) -> None:
    """A copy in which HELD_OUT of the prompts have the split "test". All or nothing."""
    trace = read_trace(source, weights=False)
    prompts = sorted({(s.split != "test", s.prompt) for s in trace})
    already = [prompt for later, prompt in prompts if not later]
    others = [prompt for later, prompt in prompts if later]
    random.Random(seed).shuffle(others)
    held_out = {*already, *others[: max(0, round(HELD_OUT * len(prompts)) - len(already))]}
    partial = folder.with_name(folder.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)
    with TraceWriter(partial, trace.meta) as writer:
        for sequence in trace:
            split = "test" if sequence.prompt in held_out else "train"
            writer.append(replace(sequence, split=split))
    partial.rename(folder)


def train_once(
    read: Recording, folder: Path, sizes: dict[str, Any], training: TrainSettings, say: Say
) -> None:
    """A predictor in folder, where there is none yet and no other process is making it."""
    if (folder / DESCRIPTION).exists():
        return
    with _alone(folder):
        if not (folder / DESCRIPTION).exists():
            say(f"training {folder.name} on {len(read.train)} sequences")
            train_predictor([read.folder], folder, sizes, training, say=say)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Only one process at a time makes a folder; who waits finds it made."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        yield


def predictor_folder(settings: Settings, model: str, task: str) -> Path:
    return (settings.predictors or settings.out / "predictors") / f"{model}-{task}"


def trained(settings: Settings, model: str, task: str, say: Say) -> RoutingPathPredictor:
    """The predictor of a model trained on a task; trained now where it is missing. A killed training goes on.

    Raises ValueError where one was promised by --predictors and is not there, or is of another model.
    """
    folder = predictor_folder(settings, model, task)
    read = recording(settings, model, task)
    if not (folder / DESCRIPTION).exists():
        if settings.predictors is not None:
            raise ValueError(
                f"--predictors {settings.predictors} has no {folder.name}; train it with `expertflow "
                f"train-predictor {read.folder} -o {folder}`, or leave --predictors out"
            )
        train_once(read, folder, {}, replace(TRAINING, seed=settings.seed), say)
    (predictor,) = load_predictors([folder], read.trace.meta, [read.folder]).values()
    return predictor


def told(
    settings: Settings,
    model: str,
    task: str,
    say: Say,
    trained_on: str | None = None,
    warm: int = 64,
) -> dict[str, Foretold]:
    """What is said of the held-out sequences of a task: by the oracle, and by "ours".

    Ours: the predictor trained on `trained_on` (None: on the task itself) with the online table; a quick run has the
    online table alone. "draft" as well, where one was recorded. warm: training sequences of this task that the table
    has served before; none across domains.
    """
    read = recording(settings, model, task)
    served = read.train[:warm] if trained_on in (None, task) else []
    found = {"oracle": foretell(read.trace.meta, read.test, "oracle", seed=settings.seed)}
    predictor = None if settings.quick else trained(settings, model, trained_on or task, say)
    name = UNTRAINED if predictor is None else "trained"
    found["ours"] = foretell(read.trace.meta, read.test, name, predictor, served, settings.seed)
    drafted = settings.traces / model / task / DRAFT
    if (drafted / FILE_NAME).exists():
        said = read_trace(drafted, weights=False)
        found[DRAFT] = foretell(read.trace.meta, read.test, DRAFT, None, served, settings.seed, said)
    return found


def conditions(settings: Settings, used: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """What results with predictors depend on, as plain JSON. used: model and task of each predictor."""
    if settings.quick:
        return {"predictor": "the online table alone, untrained", "held_out": HELD_OUT}
    if settings.predictors is not None:
        return {"predictor": f"given: {', '.join(f'{m}-{t}' for m, t in used)}", "held_out": HELD_OUT}
    minutes = f"at most {TRAINING.epochs} epochs or {TRAINING.minutes:g} minutes"
    return {"predictor": f"trained here on the recordings' other prompts, {minutes}", "held_out": HELD_OUT}
