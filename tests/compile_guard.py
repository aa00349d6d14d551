"""Compiles the Triton backend's kernels for GPUs that need not be there, and reads off what each would use of one.

``python tests/compile_guard.py`` compiles the launches that the backend ships for every target and prints those that do
not fit; exit status 1 if there are any. A green compile proves little: registers spill, shared memory exceeds what a
launch may ask for, and where tensor memory runs out Triton emits a kernel that only traps. All of these fail here.

The Triton that is imported is the one that is tested: to test another, put its folder first in PYTHONPATH.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_kernel

KIB = 1024
TENSOR_COLUMNS = 512  # of tensor memory, sm_100


@dataclass(frozen=True)
class Target:
    gpu: GPUTarget
    shared: int  # bytes that one program may have


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 * KIB),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 * KIB),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 * KIB),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * KIB),
}


@dataclass
class Finding:
    launch: str
    target: str
    registers: int = 0
    shared: int = 0
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        verdict = "; ".join(self.faults) or "ok"
        return f"{self.launch:<72} {self.target:<7} {self.registers:>3} registers {self.shared:>6} B shared  {verdict}"


def source(kernel: Any, signature: dict[str, Any], constants: dict[str, Any]) -> ASTSource:
    """As a launch would ask for it whose tensors are aligned as torch aligns them."""
    names = list(kernel.arg_names)
    types = {name: "constexpr" if name in constants else signature[name] for name in names}
    aligned = {(k,): [["tt.divisibility", 16]] for k, name in enumerate(names) if str(types[name]).startswith("*")}
    kind = ASTSource
    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource as kind
    return kind(kernel, types, {(names.index(name),): value for name, value in constants.items()}, aligned)


def examine(
    name: str, kernel: Any, signature: dict[str, str], constants: dict[str, Any], options: dict[str, Any], target: str
) -> Finding:
    """Compile one launch for one target."""
    finding, where = Finding(name, target), TARGETS[target]
    try:
        compiled = compile_kernel(source(kernel, signature, constants), target=where.gpu, options=options)
    except Exception as error:  # whatever a compiler raises is the finding
        finding.faults.append(f"{type(error).__name__}: {str(error).strip()[-300:]}")
        return finding
    finding.shared = compiled.metadata.shared
    if finding.shared > where.shared:
        finding.faults.append(f"shared memory above {where.shared}")
    if where.gpu.backend == "cuda":
        _examine_cuda(compiled, finding)
    else:
        _examine_hip(compiled.asm["amdgcn"], finding)
    return finding


def _examine_cuda(compiled: Any, finding: Finding) -> None:
    usage = _resource_usage(compiled.asm["cubin"])
    finding.registers = usage["REG"]
    # Spilled registers have no other place than the stack, and nothing else of these kernels is there.
    if usage["STACK"] or usage["LOCAL"]:
        finding.faults.append(f"spills: {usage['STACK']} B of stack, {usage['LOCAL']} B local")
    columns = getattr(compiled.metadata, "tmem_size", 0) or 0
    if columns > TENSOR_COLUMNS:
        finding.faults.append(f"{columns} columns of tensor memory")
    if re.search(r"^\s*trap;", compiled.asm["ptx"], re.MULTILINE):
        finding.faults.append("the kernel traps")


def _resource_usage(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    if found.keys() != {"REG", "STACK", "LOCAL"}:
        raise RuntimeError(f"cuobjdump does not say what the kernel uses: {text!r}")
    return found


def _examine_hip(assembly: str, finding: Finding) -> None:
    def most(key: str) -> int:
        found = [int(value) for value in re.findall(rf"\.{key}:\s*(\d+)", assembly)]
        if not found:
            raise RuntimeError(f"the assembly does not say its {key}")
        return max(found)

    finding.registers = most("vgpr_count")
    spilled = most("vgpr_spill_count") + most("sgpr_spill_count")
    if spilled:
        finding.faults.append(f"spills: {spilled} registers")


# What to compile of what is shipped. Kernels that differ in H alone differ in a few numbers: of those, one whose H is a
# multiple of 16 and one whose H is not stand for all others.
EXTENTS = {
    "all": "every kernel for every H",
    "configurations": "every configuration of every kernel",
    "sizes": "of each driver, cell and dtype one size, without mgu and ligru, which are gru with less in it; options "
    "of lstm and slstm in float32 and of indrnn_relu in bfloat16",
    "drivers": "as sizes, without float16 and rnn_relu, which differ from bfloat16 and rnn_tanh in an instruction",
}


def launches(target: str, extent: str) -> list[Any]:
    """What the backend ships for a target, by a word of EXTENTS."""
    from rnnkern.backends.triton import shipped

    different, everything = {}, extent == "all"
    asked: dict[str, Any] = {} if extent in ("all", "configurations") else {"sizes": (64, 512), "batches": (16,)}
    if asked:
        asked["options"] = (("lstm", torch.float32), ("slstm", torch.float32), ("indrnn_relu", torch.bfloat16))
    if extent == "sizes":
        asked["cells"] = ("rnn_tanh", "rnn_relu", "lstm", "gru")
    if extent == "drivers":
        dtypes = (torch.float64, torch.float32, torch.bfloat16)
        asked |= {"cells": ("rnn_tanh", "lstm", "gru"), "dtypes": dtypes}
    for one in shipped.shipped(shipped.TARGETS[target], **asked):
        width = None if everything else one.constexprs.get("H", 0) % 16 == 0
        constants = {k: v for k, v in one.constexprs.items() if everything or k not in ("H", "P")}
        different.setdefault((str(one.kernel), width, str(constants), str(one.signature), str(one.options)), one)
    return list(different.values())


_listed: dict[tuple[Any, ...], list[Any]] = {}  # of this process


def _one(job: tuple[int, tuple[str, str]]) -> Finding:
    index, asked = job
    if asked not in _listed:
        _listed[asked] = launches(*asked)
    return examine(*_listed[asked][index], target=asked[0])


def survey(targets: Iterable[str], processes: int, extent: str) -> Iterable[Finding]:
    """Every launch on every target, as they are done."""
    jobs = []
    for target in targets:
        asked = (target, extent)
        jobs += [(index, asked) for index in range(len(launches(*asked)))]
    # Not forked: the compiler's libraries have threads of their own.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_one, jobs, chunksize=4)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", default=list(TARGETS), help=f"of {', '.join(TARGETS)}")
    words = "; ".join(f"{name}: {what}" for name, what in EXTENTS.items())
    parser.add_argument("--extent", choices=EXTENTS, default="configurations", help=words)
    parser.add_argument("--verbose", action="store_true", help="print a line for those that fit as well")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    unknown = sorted(set(args.targets) - TARGETS.keys())
    if unknown:
        parser.error(f"unknown targets {', '.join(unknown)}: expected some of {', '.join(TARGETS)}")
    count = faulty = 0
    for finding in survey(args.targets, args.processes, args.extent):
        count += 1
        faulty += bool(finding.faults)
        if finding.faults or args.verbose:
            print(finding, flush=True)
    print(f"Triton {triton.__version__}: {count} kernels compiled, {faulty} do not fit")
    return 1 if faulty or not count else 0


if __name__ == "__main__":
    sys.exit(main())
