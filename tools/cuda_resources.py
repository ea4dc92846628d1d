"""Resources that the kernels of csrc/cuda take on each architecture, read from machine code; no GPU is needed.

    python tools/cuda_resources.py

Reads the installed module ``cnm_kernels._C_cuda``; where that was not built, compiles the sources with nvcc. Prints per
kernel and architecture: registers, bytes of stack (what is spilled would lie there), shared memory of a block at the
published sizes, how many warps a processor holds, and how many tensor-core instructions the machine code has.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

CUDA = Path(__file__).resolve().parents[1] / "csrc" / "cuda"
ARCHITECTURES = ("8.0", "9.0a", "10.0")  # where the sources must be compiled here
REGISTERS = 65536  # of a processor
MAX_WARPS = {"sm_80": 64, "sm_86": 48, "sm_89": 48, "sm_90a": 64, "sm_100": 64}  # that a processor holds
SHARED_BYTES = {"sm_80": 163 << 10, "sm_86": 99 << 10, "sm_89": 99 << 10, "sm_90a": 227 << 10, "sm_100": 227 << 10}
BYTES = {"float": 4, "bf16": 2, "f16": 2}
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+)?\s*([A-Z0-9_.]+)\s*([^;]*);")
STARTS_DIVISION = ("I2F.RP", "I2F.U32.RP", "I2F.U64.RP")  # of an integer, by its reciprocal


@dataclass(frozen=True)
class Kernel:
    """One instantiation on one architecture."""

    name: str  # with its template arguments
    architecture: str
    registers: int
    stack: int
    tensor_instructions: int
    code: Counter[str] = field(default_factory=Counter, compare=False)  # instructions with their modifiers
    divisions_in_loops: int = 0  # of integers: what starts one

    def count(self, pattern: str) -> int:
        """Instructions whose name starts with this."""
        return sum(often for name, often in self.code.items() if re.match(pattern, name))

    @property
    def op(self) -> str:
        return self.name.partition("<")[0]

    @property
    def arguments(self) -> list[str]:
        return [argument.strip() for argument in self.name.partition("<")[2].rstrip(">").split(",") if argument]

    @property
    def groups(self) -> bool:
        """Whether its products are wgmma, where the architecture has that; else the kernel is empty."""
        return self.op in ("linear_nll_kernel", "linear_nll_word_gradient_kernel") and self.arguments[-1] == "true"

    @property
    def threads(self) -> int:
        """Shared memory of a block at the published sizes, as the host code launches it."""
        if self.op in ("linear_nll_kernel", "linear_nll_word_gradient_kernel"):
            return 128 if self.arguments[0] == "float" else 256
        if self.op == "attention_backward_short_kernel":
            return 13 * 32
        if self.op.startswith(("attention", "key_weight", "gaussian_mask", "dropout_add", "layer_norm")):
            return 128
        return 256

    @property
    def shared(self) -> int:
        """Bytes of a block, as the host code asks for them, with 200 keys or 256 columns."""
        if self.groups and self.architecture != "sm_90a":
            return 0
        if self.op == "attention_short_kernel":
            return 208 * (2 * 64 * 2 + 4)
        if ("attention" not in self.op and not self.op.startswith("linear_nll")) or len(self.arguments) < 2:
            return 0
        size, width = BYTES[self.arguments[0]], int(self.arguments[1])
        row = size * width + 16
        if self.op == "attention_kernel":
            whole = 5 * 64 * row + 256
            return whole if whole <= SHARED_BYTES[self.architecture] else 3 * 64 * row + 256
        if self.op == "attention_weights_kernel":
            return 2 * 64 * row + 256
        if self.op == "attention_backward_kernel":
            return 4 * 64 * row + 5 * 256
        if self.op == "attention_backward_short_kernel":
            warps, queries = 13, 16
            of_warp = 32 * row + 16 * (size * queries + 16) + 4 * (2 * queries + 32)
            return 4 * queries * row + 4 * 4 * queries + warps * of_warp
        if self.groups:  # 128 rows and four tiles of 64 keys, and what is noted of a key
            return 1024 + (128 + 4 * 64) * size * width + 4 * 128 + 4 * 64 * 16
        keys, rows = 32 if size == 4 or width > 128 else 64, self.threads // 32 * 16
        both = (rows + 2 * keys) * row + 4 * rows + 12 * keys
        return both if both <= SHARED_BYTES[self.architecture] else both - keys * row

    @property
    def warps(self) -> int:
        """The number of warps that a processor holds at a time."""
        registers = -(-self.registers // 8) * 8 * 32
        blocks = REGISTERS // (registers * (self.threads // 32))
        if self.shared:
            blocks = min(blocks, (SHARED_BYTES[self.architecture] + 1024) // (self.shared + 1024))
        return min(blocks * self.threads // 32, MAX_WARPS[self.architecture])


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit; Triton brings some along."""
    places = [os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin"]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        places.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    return shutil.which(name) or next((found for place in places if (found := shutil.which(name, path=place))), None)


def built_module() -> Path | None:
    """``_C_cuda`` as installed."""
    package = importlib.util.find_spec("cnm_kernels")
    folders = package.submodule_search_locations if package is not None else None
    return next((path for folder in folders or [] for path in Path(folder).glob("_C_cuda*.so")), None)


def compiled_sources(folder: Path) -> list[Path]:
    """The sources, compiled by nvcc for each architecture."""

    def compile_one(job: tuple[Path, str]) -> Path:
        source, architecture = job
        number = architecture.replace(".", "")
        target = folder / f"{source.stem}-{number}.cubin"
        command = [
            str(tool("nvcc")), "-std=c++17", "-O3", "--expt-relaxed-constexpr", "-DCNM_CUDA", f"-I{CUDA.parent}",
            f"-I{CUDA}", f"-arch=sm_{number}", "-cubin", str(source), "-o", str(target),
        ]  # fmt: skip
        subprocess.run(command, check=True)
        return target

    jobs = [(source, architecture) for source in sorted(CUDA.glob("*.cu")) for architecture in ARCHITECTURES]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, jobs))


def short_names(mangled: list[str]) -> dict[str, str]:
    """Demangles names of kernels, without namespaces and parameters."""
    demangler = tool("cu++filt") or shutil.which("c++filt")
    if demangler is None:
        raise RuntimeError("neither cu++filt nor c++filt is here to read the kernels' names")
    said = subprocess.run([demangler], input="\n".join(mangled), capture_output=True, text=True, check=True).stdout
    short = {}
    for name, full in zip(mangled, said.splitlines(), strict=True):
        full = re.sub(r"\(anonymous namespace\)::|cnm::cuda::|cnm::|^void ", "", full)
        full = re.sub(r"\(int\)|\(bool\)", "", full)
        short[name] = re.split(r"\(", full)[0].replace(", 0>", ", false>").replace(", 1>", ", true>")
    return short


def read(file: Path) -> Iterator[Kernel]:
    """The kernels in a module or cubin."""
    dumper = tool("cuobjdump")
    if dumper is None:
        raise RuntimeError("cuobjdump is not here")
    cubin = re.search(r"-(\w+)\.cubin$", file.name)  # which does not name its architecture itself
    of_file = f"sm_{cubin.group(1)}" if cubin else ""
    usage = subprocess.run([dumper, "--dump-resource-usage", str(file)], capture_output=True, text=True, check=True)
    architecture, name, found = of_file, "", []
    for line in usage.stdout.splitlines():
        if match := re.search(r"arch = (sm_\w+)", line):
            architecture = match.group(1)
        elif match := re.search(r"Function (\w+):", line):
            name = match.group(1)
        elif match := re.search(r"REG:(\d+) STACK:(\d+)", line):
            found.append((architecture, name, int(match.group(1)), int(match.group(2))))
    codes: dict[tuple[str, str], Counter[str]] = {}
    divisions: dict[tuple[str, str], list[int]] = {}
    loops: dict[tuple[str, str], list[tuple[int, int]]] = {}
    architecture = of_file
    with subprocess.Popen([dumper, "-sass", str(file)], stdout=subprocess.PIPE, text=True) as code:
        assert code.stdout is not None
        for line in code.stdout:
            if "arch = " in line:
                architecture = line.split("=")[1].strip()
            elif "Function : " in line:
                name = line.split(":")[1].strip()
            elif match := INSTRUCTION.match(line):
                key, at = (architecture, name), int(match[1], 16)
                codes.setdefault(key, Counter())[match[2]] += 1
                if match[2].startswith(STARTS_DIVISION):
                    divisions.setdefault(key, []).append(at)
                if (
                    match[2].startswith("BRA")
                    and (to := re.findall(r"0x([0-9a-f]+)", match[3]))
                    and int(to[-1], 16) < at
                ):
                    loops.setdefault(key, []).append((int(to[-1], 16), at))
    names = short_names(sorted({name for _, name, _, _ in found}))
    for architecture, name, registers, stack in found:
        key = (architecture, name)
        code = codes.get(key, Counter())
        inside = [at for at in divisions.get(key, []) if any(a <= at <= b for a, b in loops.get(key, []))]
        products = sum(often for one, often in code.items() if one.startswith(("HMMA", "HGMMA")))
        yield Kernel(names[name], architecture, registers, stack, products, code, len(inside))


def kernels() -> list[Kernel]:
    """All of them, by name and architecture."""
    module = built_module()
    if module is not None:
        found = list(read(module))
    else:
        with tempfile.TemporaryDirectory() as folder:
            found = [kernel for file in compiled_sources(Path(folder)) for kernel in read(file)]
    return sorted(found, key=lambda kernel: (kernel.name, kernel.architecture))


def why_not() -> str | None:
    """Why there is nothing to read here."""
    if tool("cuobjdump") is None:
        return "cuobjdump is not here (it comes with CUDA and with triton)"
    if built_module() is None and tool("nvcc") is None:
        return "cnm_kernels._C_cuda is not built and nvcc is not here"
    return None


def main() -> int:
    reason = why_not()
    if reason is not None:
        print(reason, file=sys.stderr)
        return 1
    print(f"{'kernel':<58}{'arch':<9}{'registers':>9}{'stack':>7}{'shared':>9}{'warps':>7}{'HMMA':>7}")
    for kernel in kernels():
        print(
            f"{kernel.name:<58}{kernel.architecture:<9}{kernel.registers:>9}{kernel.stack:>7}{kernel.shared:>9}"
            f"{kernel.warps:>7}{kernel.tensor_instructions:>7}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
