"""Run the neon kernels in an emulated Arm processor and compare them with the scalar ones.

    python tools/neon/emulate.py          (needs the extra `cross`: ziglang to compile, unicorn to emulate)

Compiles check.cpp with the kernels into one static program, loads it into the emulator, and calls `check` for every
precision, group size, scales and kind of call. Exit status 1 if anything differs by more than rounding.
"""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import unicorn
from unicorn import arm64_const as arm

NATIVE = Path(__file__).parents[2] / "src/bitstrata/kernels/cpu/native"
TARGET = ["-target", "aarch64-linux-musl", "-mcpu=generic+v8_2a+dotprod+fullfp16"]
LIMIT = 1e-2  # outputs are sums of 301 products of order one: rounding of levels and sums reaches a third of it
STACK, RETURN, THREAD = 0x7F0000000000, 0x7E0000000000, 0x7D0000000000
PAGE = 4096


def build(folder: Path) -> Path:
    """check.cpp, the layout and both sets of kernels as one static program."""
    program = folder / "check"
    sources = [Path(__file__).with_name("check.cpp"), NATIVE / "layout.cpp"]
    sources += [NATIVE / isa / "kernels.cpp" for isa in ("neon", "scalar")]
    cache = {"ZIG_GLOBAL_CACHE_DIR": str(folder), "ZIG_LOCAL_CACHE_DIR": str(folder)}
    command = [sys.executable, "-m", "ziglang", "c++", *TARGET, "-std=c++17", "-O1", "-static", "-fno-sanitize=all"]
    command += ["-fno-stack-protector", f"-I{NATIVE}", *map(str, sources), "-o", str(program)]
    subprocess.run(command, check=True, env=os.environ | cache)
    return program


def load(program: bytes) -> Callable[..., float]:
    """The program's `check` as a Python function: integers in, a float32 out."""
    emulator = unicorn.Uc(unicorn.UC_ARCH_ARM64, unicorn.UC_MODE_ARM)
    emulator.ctl_set_cpu_model(arm.UC_CPU_ARM64_MAX)
    header_at, sections_at = struct.unpack_from("<QQ", program, 32)
    segments = struct.unpack_from("<H", program, 56)[0]
    mapped: set[int] = set()
    for index in range(segments):
        kind, _, offset, address, _, size, memory, _ = struct.unpack_from("<IIQQQQQQ", program, header_at + 56 * index)
        if kind != 1:  # not loaded
            continue
        for page in range(address // PAGE * PAGE, address + memory, PAGE):
            if page not in mapped:
                emulator.mem_map(page, PAGE)
                mapped.add(page)
        emulator.mem_write(address, program[offset : offset + size])
    entry = _symbol(program, sections_at, b"check")
    for address, size in ((STACK, 1 << 23), (RETURN, PAGE), (THREAD, 1 << 16)):
        emulator.mem_map(address, size)

    def call(*arguments: int) -> float:
        for number, value in enumerate(arguments):
            emulator.reg_write(arm.UC_ARM64_REG_X0 + number, value)
        emulator.reg_write(arm.UC_ARM64_REG_LR, RETURN)
        emulator.reg_write(arm.UC_ARM64_REG_SP, STACK + (1 << 23) - (1 << 16))
        emulator.reg_write(arm.UC_ARM64_REG_TPIDR_EL0, THREAD + (1 << 15))
        emulator.reg_write(arm.UC_ARM64_REG_CPACR_EL1, 3 << 20)  # floating point on
        emulator.emu_start(entry, RETURN)
        bits = emulator.reg_read(arm.UC_ARM64_REG_S0) & 0xFFFFFFFF
        return float(struct.unpack("<f", struct.pack("<I", bits))[0])

    return call


def _symbol(program: bytes, sections_at: int, name: bytes) -> int:
    count = struct.unpack_from("<H", program, 60)[0]
    sections = [struct.unpack_from("<IIQQQQIIQQ", program, sections_at + 64 * index) for index in range(count)]
    table = next(section for section in sections if section[1] == 2)  # the symbols
    names = sections[table[6]][4]
    for index in range(table[5] // 24):
        at, _, _, _, value, _ = struct.unpack_from("<IBBHQQ", program, table[4] + 24 * index)
        if program[names + at : program.index(b"\0", names + at)] == name:
            return int(value)
    raise LookupError(f"no symbol {name!r}")


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        check = load(build(Path(folder)).read_bytes())
    failed, count, worst = 0, 0, 0.0
    for what, label in enumerate(("few rows", "decoded tiles", "exact rows", "many rows")):
        for codebook in (0, 1):
            for group_size in (301,) if codebook else (16, 32, 43, 64, 128, 200, 301):
                for bits in range(1, 9):
                    calls = ((1, 0), (3, 0), (3, max(1, bits - 2))) if what == 0 and bits > 1 else ((2, 0),)
                    for rows, low_bits in calls:
                        found = check(bits, group_size, rows, codebook, low_bits, what)
                        count, worst = count + 1, max(worst, found)
                        if not found <= LIMIT:
                            failed += 1
                            print(
                                f"{label}: codebook {codebook}, group {group_size}, {bits} bits, {rows} rows: {found}"
                            )
    print(f"neon against scalar, emulated: {count} cases, {failed} failed, largest difference {worst:.2g}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
