#!/usr/bin/env bash
# wheels.sh VENV PYTHON...: wheels for Linux with glibc 2.28, on x86-64 and 64-bit Arm, by one cross compiler, into dist/.
# A Python before 3.12 makes its own, any other the one of the stable ABI. VENV has the extra `cross`, which is not what
# the kernels are compiled for: VENV only starts the compiler.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$PWD/$1
shift
export ZIG_GLOBAL_CACHE_DIR="$PWD/build/zig" ZIG_LOCAL_CACHE_DIR="$PWD/build/zig" BITSTRATA_REQUIRE_NATIVE=1
mkdir -p build/wheels dist

for python in "$@"; do
  for machine in x86_64 aarch64; do
    settings=(--config-settings cmake.define.CMAKE_SYSTEM_NAME=Linux --config-settings "cmake.define.CMAKE_SYSTEM_PROCESSOR=$machine")
    if [ "$machine" = aarch64 ]; then
      settings+=(--config-settings cmake.define.BITSTRATA_NEON_FLAGS=-mcpu=generic+v8_2a+dotprod+fullfp16)
    fi
    tag=$("$python" -c "import sys; print('%d%d' % sys.version_info[:2])")
    log=build/wheels/$tag-$machine.txt
    rm -rf "build/wheels/$machine"
    # -I: the build's environment hides VENV's packages from its own Python. The suffix is that of a Python before 3.12.
    CXX="$venv/bin/python -I -m ziglang c++ -target $machine-linux-gnu.2.28" \
      _PYTHON_HOST_PLATFORM="linux-$machine" SETUPTOOLS_EXT_SUFFIX=".cpython-$tag-$machine-linux-gnu.so" \
      "$python" -m pip wheel --verbose --no-deps --wheel-dir "build/wheels/$machine" "${settings[@]}" . > "$log" 2>&1 ||
      { tail -n 60 "$log"; exit 1; }
    PATH="$venv/bin:$PATH" "$venv/bin/python" -m auditwheel repair --wheel-dir dist "build/wheels/$machine"/*.whl
  done
done
for wheel in dist/*abi3*.whl; do
  [ ! -e "$wheel" ] || "$venv/bin/python" -m abi3audit --strict "$wheel"
done
ls -l dist
