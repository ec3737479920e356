#!/usr/bin/env bash
# eval_environment.sh VENV BASE: lm-evaluation-harness in an environment of its own on top of BASE, whose packages it
# sees: what it brings along (half a gigabyte) would be imported by transformers wherever it is found.
# Ends with 3 and a reason where the packages cannot be had.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1 base=$2
[ -e "$venv/.ready" ] && [ "$venv/.ready" -nt constraints.txt ] && exit 0
site='import sysconfig; print(sysconfig.get_path("purelib"))'

"${PYTHON:-python3}" -m venv "$venv"
# paths of a .pth are those of packages; the editable install of BASE is itself a .pth, which is not followed
printf '%s\n%s\n' "$("$base/bin/python" -c "$site")" "$PWD/src" > "$("$venv/bin/python" -c "$site")/base.pth"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt "lm-eval[hf]" \
  > "$venv/install.log" 2>&1 || {
  echo "lm-evaluation-harness could not be installed: $(grep -m1 ERROR "$venv/install.log" || tail -n1 "$venv/install.log")"
  exit 3
}
touch "$venv/.ready"
