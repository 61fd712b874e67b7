"""llama.cpp beside ours: the same bf16 weights, converted by its own tool, on the same disk, in the same cgroup.

It is not installed by anything here: build it (the sources are inside the sdist of llama-cpp-python as well) and give
its folder with `--llama-cpp`:

    cmake -B build -DCMAKE_BUILD_TYPE=Release -DLLAMA_CURL=OFF && cmake --build build --target llama-bench

Its converter needs the packages that its requirements name (gguf lies in the tree).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.common import memory_limit
from benchmarks.rivals import Ran, gguf_of

# Checkpoints with random weights have no tokenizer, and speed does not depend on one.
_CONVERT = """
import sys
sys.path[:0] = [{tree!r}, {tree!r} + "/gguf-py"]
import convert_hf_to_gguf as tool
try:
    from conversion.base import TextModel  # since 2026
except ImportError:
    from convert_hf_to_gguf import TextModel
def no_vocabulary(self):
    self._set_vocab_none()
    self.gguf_writer.add_vocab_size(self.hparams["vocab_size"])
TextModel._set_vocab_gpt2 = no_vocabulary
sys.argv = ["convert_hf_to_gguf.py", {folder!r}, "--outtype", "bf16", "--outfile", {out!r}]
tool.main()
"""


def find_bench(tree: Path) -> Path:
    """The built llama-bench of a source tree. SystemExit with the remedy when it is not there."""
    binary = tree / "build" / "bin" / "llama-bench"
    if not binary.is_file():
        raise SystemExit(
            f"{binary} is not there; build llama.cpp in {tree} as benchmarks/rivals/llama_cpp.py says"
        )
    return binary


def convert(tree: Path, folder: Path) -> Path:
    """The checkpoint as GGUF beside it, written once; of one that failed nothing is left. RuntimeError says why."""
    out = gguf_of(folder)
    if not out.exists():
        partial = out.with_suffix(".part")
        code = _CONVERT.format(tree=str(tree.resolve()), folder=str(folder), out=str(partial))
        try:
            done = subprocess.run(
                [sys.executable, "-c", code],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                check=False,
            )
            if done.returncode != 0:
                tail = " | ".join(done.stderr.strip().splitlines()[-3:])
                raise RuntimeError(
                    f"the converter of llama.cpp failed with exit status {done.returncode}: {tail}"
                )
            partial.rename(out)
        finally:
            partial.unlink(missing_ok=True)
    return out


def command(tree: Path, gguf: Path, steps: int, threads: int, mmap: bool = True) -> list[str]:
    """llama-bench decoding `steps` tokens of one sequence, no prompt, once; the answer is JSON."""
    bench = str(find_bench(tree))
    decode_only = ["-p", "0", "-n", str(steps), "-r", "1"]
    knows = subprocess.run([bench, "--help"], capture_output=True, text=True, check=False).stdout
    if "--load-mode" in knows:  # since 2026
        load = ["--load-mode", "mmap" if mmap else "none"]
    else:
        load = ["--mmap", str(int(mmap))]
    return [bench, "-m", str(gguf), *decode_only, "-t", str(threads), *load, "-o", "json"]


def converted_and_decoded(
    tree: Path, folder: Path, memory: int | None, steps: int, threads: int
) -> dict[str, Any]:
    """What `decode` says of the checkpoint, or why it could not be converted, as `error`."""
    try:
        gguf = convert(tree, folder)
    except (RuntimeError, OSError) as error:
        return {"error": str(error)}
    return decode(tree, gguf, memory, steps, threads)


def decode(
    tree: Path, gguf: Path, memory: int | None, steps: int, threads: int, mmap: bool = True
) -> dict[str, Any]:
    """Decode `steps` tokens of one sequence after a warm-up, page cache cold, in a cgroup of `memory` bytes."""
    with open(gguf, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    asked = command(tree, gguf, steps, threads, mmap)
    with memory_limit(memory) as group:
        enter = group.enter if group is not None and group.available else None
        done = subprocess.run(asked, capture_output=True, text=True, preexec_fn=enter, check=False)
        peak = group.peak_bytes() if group is not None else None
    if done.returncode != 0:
        tail = done.stderr.strip().splitlines()[-3:]
        return {"error": f"exit status {done.returncode}: {' | '.join(tail)}", "peak_bytes": peak}
    (result,) = json.loads(done.stdout)
    flags = {"weights": "bf16, by its own converter", "arguments": " ".join(["llama-bench", *asked[3:]])}
    return {
        "ran": Ran("llama.cpp", f"commit {result['build_commit']}", flags).to_dict(),
        "tokens_per_s": result["avg_ts"],
        "first_token_s": 0.0,
        "peak_bytes": peak,
        "limit_bytes": memory,
        "limit_enforced": enter is not None,
    }
