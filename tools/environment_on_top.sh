#!/usr/bin/env bash
# environment_on_top.sh VENV BASE PACKAGE...: packages in an environment of their own on top of BASE, whose packages it
# sees. What lm-evaluation-harness and clients of ours bring along is large, and is imported wherever it is found.
# Ends with 3 and a reason where the packages cannot be had.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1 base=$2
shift 2
[ -e "$venv/.ready" ] && [ "$venv/.ready" -nt constraints.txt ] && exit 0
site='import sysconfig; print(sysconfig.get_path("purelib"))'

"${PYTHON:-python3}" -m venv "$venv"
# paths of a .pth are those of packages; the editable install of BASE is itself a .pth, which is not followed
printf '%s\n%s\n' "$("$base/bin/python" -c "$site")" "$PWD/src" > "$("$venv/bin/python" -c "$site")/base.pth"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt "$@" \
  > "$venv/install.log" 2>&1 || {
  echo "$* could not be installed: $(grep -m1 ERROR "$venv/install.log" || tail -n1 "$venv/install.log")"
  exit 3
}
touch "$venv/.ready"
