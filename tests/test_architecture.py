"""The direction of imports (docs/architecture.md), read from the source: nothing is imported to check it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "expertflow"

# Unit (a package or module directly under expertflow/) -> units it may import. Every unit is here, the
# ones still to be written too: a new one must say where it stands.
BELOW: dict[str, set[str]] = {
    "core": set(),
    "config": {"core"},
    "trace": {"core"},
    "whole_file": set(),
    "kv_name": set(),
    "timeline": {"whole_file"},
    "store": {"core", "config", "trace", "early_memory"},
    "cache": {"core", "config", "trace", "store", "timeline"},
    "predictor": {"core", "config", "trace", "whole_file"},
    "scheduler": {"core", "kv_name"},
    "sim": {"core", "config", "trace", "cache", "predictor", "scheduler"},
    "step_time": {"core", "config"},
    "budget": {"core", "config", "early_memory"},
    "early_memory": set(),
    "read_ahead": {"budget", "early_memory"},
    "disturbance": set(),
    "hub_headers": {"core", "config", "store"},
    "models": {
        "core",
        "config",
        "trace",
        "store",
        "cache",
        "predictor",
        "budget",
        "early_memory",
        "read_ahead",
        "step_time",
        "kv_name",
    },
    "measure": {"core", "config", "store", "cache", "models", "step_time", "kv_name"},
}
BELOW["forecast"] = {*BELOW} - {"predictor", "scheduler", "sim"}
BELOW["engine"] = {*BELOW} - {"sim", "forecast"}
BELOW["check"] = {*BELOW} - {"predictor", "scheduler", "sim", "forecast"}
BELOW["report"] = {"core", "config", "budget", "engine", "whole_file"}
BELOW["machine_profile"] = {"config", "disturbance", "forecast", "measure", "sim", "step_time", "whole_file"}
BELOW["server"] = {*BELOW}
BELOW["commands"] = {*BELOW}
BELOW["cli"] = {*BELOW}

# Decisions: the simulator runs these very files with a virtual clock.
DECIDE = (
    "core.py",
    "cache/slots.py",
    "cache/plan.py",
    "scheduler/moves.py",
    *sorted(str(path.relative_to(PACKAGE)) for path in (PACKAGE / "cache" / "policies").glob("*.py")),
)
# Decisions on tensors: torch is allowed to these, and no more.
GROUPING = tuple(
    f"scheduler/{name}.py" for name in ("similarity", "two_means", "swaps", "group", "admission")
)
EXECUTION = {
    "asyncio", "concurrent", "io", "logging", "mmap", "multiprocessing", "os", "pathlib", "queue", "random",
    "select", "shutil", "signal", "socket", "subprocess", "tempfile", "threading", "time", "transformers",
    "torch.accelerator", "torch.cuda", "torch.multiprocessing",
}  # fmt: skip
FOR_THE_SIMULATOR = {"cache.slots", "cache.policies", "cache.plan"}


def sources() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def unit_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST, package: str) -> Iterator[str]:
    """Dotted names a file imports anywhere in it: at the top, in a function, for type checking only."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            # `from expertflow import store` names a unit, `from expertflow.core import ExpertId` does not;
            # both spellings together cover either case.
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def imports_of(path: Path) -> set[str]:
    package = ".".join(path.relative_to(ROOT).parent.parts)
    return set(imports(ast.parse(path.read_text()), package))


def units(names: set[str]) -> set[str]:
    return {name.split(".")[1] for name in names if name.startswith("expertflow.")} & set(BELOW)


def uphill(unit: str, names: set[str]) -> set[str]:
    wrong = units(names) - BELOW[unit] - {unit}
    if unit == "sim":
        inner = {name.removeprefix("expertflow.") for name in names if name.startswith("expertflow.cache.")}
        wrong |= {
            name
            for name in inner
            if not any(name == ok or name.startswith(f"{ok}.") for ok in FOR_THE_SIMULATOR)
        }
    return wrong


def starting_with(names: set[str], forbidden: set[str]) -> set[str]:
    return {name for name in names if any(name == bad or name.startswith(f"{bad}.") for bad in forbidden)}


def test_the_order_has_no_cycle():
    for unit, below in BELOW.items():
        assert below <= BELOW.keys(), f"{unit} may import something unknown"
        for other in below - {unit}:
            assert unit not in BELOW[other], f"{unit} and {other} import each other"


def test_every_unit_has_its_place():
    unknown = {unit_of(path) for path in sources()} - BELOW.keys() - {"__main__"}
    assert not unknown, f"say in BELOW what {unknown} may import"


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_downhill(path):
    if unit_of(path) not in BELOW:
        return  # test_every_unit_has_its_place fails
    wrong = uphill(unit_of(path), imports_of(path))
    assert not wrong, f"{path.relative_to(ROOT)} may not import {sorted(wrong)}"


@pytest.mark.parametrize("name", DECIDE)
def test_code_that_decides_imports_no_thread_clock_file_or_device(name):
    names = imports_of(PACKAGE / name)
    assert not starting_with(names, EXECUTION)
    if name != "core.py":
        assert not starting_with(names, {"torch"}), "slots, policies and plans touch no tensor"
        assert units(names) <= {"core", "cache"}
        others = {f"expertflow.cache.{other}" for other in ("loader", "expert_cache", "stats")}
        assert not starting_with(names, others)


@pytest.mark.parametrize("name", GROUPING)
def test_grouping_imports_no_thread_clock_file_or_device(name):
    names = imports_of(PACKAGE / name)
    assert not starting_with(names, EXECUTION)
    assert units(names) <= {"core", "scheduler"}


def test_code_that_decides_opens_and_prints_nothing():
    for name in (*DECIDE, *GROUPING):
        tree = ast.parse((PACKAGE / name).read_text())
        called = {
            node.func.id
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert not called & {"open", "print", "input", "exec", "eval", "__import__"}, name


def test_threads_below_the_engine_start_in_three_places():
    starters = {
        str(path.relative_to(PACKAGE))
        for path in sources()
        if unit_of(path) in {"core", "config", "trace", "store", "cache", "predictor", "scheduler", "sim"}
        and "Thread(" in path.read_text()
    }
    assert starters == {"cache/loader.py", "cache/touching.py", "scheduler/pipeline.py"}


def test_there_is_no_place_for_odds_and_ends():
    names = {path.stem for path in sources()}
    assert not names & {"utils", "util", "helpers", "helper", "common", "misc", "registry", "globals"}


@pytest.mark.parametrize(
    ("unit", "source", "expected"),
    [
        ("store", "import expertflow.cache.slots", {"cache"}),
        ("store", "def f():\n    from expertflow.cache import slots", {"cache"}),
        ("cache", "from ..models import experts", {"models"}),
        ("cache", "from .slots import SlotTable", set()),
        ("predictor", "from expertflow import scheduler", {"scheduler"}),
        ("sim", "from expertflow.cache.loader import Loader", {"cache.loader", "cache.loader.Loader"}),
        ("sim", "from expertflow.cache import expert_cache", {"cache.expert_cache"}),
        ("sim", "from expertflow.cache.plan import CachePlan", set()),
        ("engine", "from expertflow.server import app", {"server"}),
    ],
)
def test_the_checker_sees(unit, source, expected):
    names = set(imports(ast.parse(source), f"expertflow.{unit}"))
    assert uphill(unit, names) == expected


SNAPSHOT = """
import importlib
def registries():
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
    return [
        set(AUTO_QUANTIZER_MAPPING), set(AUTO_QUANTIZATION_CONFIG_MAPPING),
        set(ALL_EXPERTS_FUNCTIONS.valid_keys()),
        set(CONFIG_MAPPING._extra_content), len(MODEL_FOR_CAUSAL_LM_MAPPING._extra_content),
    ]
before = registries()
assert before[0] and before[1] and before[2], "the test looks at the wrong place"
for name in {modules}:
    importlib.import_module(name)
after = registries()
assert after == before, [new - old for new, old in zip(after[:4], before[:4])]
"""


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=200)


def module_names() -> list[str]:
    dotted = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sources()]
    return [
        "expertflow",
        *(name.removesuffix(".__init__") for name in dotted if not name.endswith("__main__")),
    ]


def test_importing_registers_nothing_with_transformers():
    """Registration happens in a call (models/attach.py: register), so importing us changes nobody's model."""
    done = run_python(SNAPSHOT.format(modules=module_names()))
    assert done.returncode == 0, done.stderr


def test_importing_expertflow_itself_imports_no_torch():
    done = run_python(
        "import sys, expertflow; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    assert done.returncode == 0, done.stderr
