#!/bin/sh
# Makes the virtual environment from requirements-cpu.lock. Called by make when the stamp of the lock is missing.
# usage: install.sh PYTHON VENV LOCK
set -eu

python=$1 venv=$2 lock=$3
torch=$(grep '^torch==' "$lock")

fail() { # what, where, what to do
    printf 'error: %s\nwhere: %s\nto do: %s\n' "$1" "$2" "$3" >&2
    exit 2
}

pip() {
    "$venv/bin/python" -m pip --disable-pip-version-check --no-input "$@"
}

platform="$(uname -s) $(uname -m)"
[ "$platform" = "Linux x86_64" ] || fail "$lock holds wheels for Linux x86_64 only" "this machine: $platform" \
    "pip install -e '.[vllm,train,dev]' into an environment of your own, run python -m pipeline there"

version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || version=none
[ "$version" = "3.11" ] || fail "Python 3.11 is needed, found: $version" "PYTHON=$python" \
    "install python3.11 (Debian 12: apt-get install python3 python3-venv), or make PYTHON=path-to-python3.11 ..."

# An interrupted install or a Python that moved leaves an environment that cannot run pip: start over. Else mend in place.
if ! "$venv/bin/python" -c 'import sys, pip; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
    "$python" -m venv --clear "$venv" ||
        fail "the environment cannot be made" "$python -m venv $venv" "apt-get install python3.11-venv (or python3-venv)"
fi

echo "installing $(grep -c '==' "$lock") packages into $venv (2 to 5 minutes, once)"

# torch first, with only what `import torch` needs: on many indexes this version is a CUDA build, and nothing else is worth
# downloading until it is not. No bytecode yet: it is written when a module is first imported.
first=$(grep -E '^(torch|filelock|fsspec|jinja2|markupsafe|mpmath|networkx|numpy|sympy|typing-extensions)==' "$lock")
# shellcheck disable=SC2086 # one argument a pin
pip install -qq --no-deps --no-compile $first &&
    imported=$("$venv/bin/python" -c 'import torch; print(torch.version.cuda)' 2>&1) ||
    imported="failed: ${imported:-pip could not install it}"
imported=$(printf '%s\n' "$imported" | tail -n 1) # the cause stands last, and warnings before it
[ "$imported" = "None" ] || {
    pip uninstall -qq --yes torch || true
    fail "$torch is not a CPU build, or does not import ($imported)" "pip install $torch, PIP_EXTRA_INDEX_URL=${PIP_EXTRA_INDEX_URL:-(not set)}" \
        "export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu (the CPU wheels), then the same make command"
}

pip install -qq --no-deps --no-compile -r "$lock" ||
    fail "the lock could not be installed" "pip install --no-deps -r $lock" "read pip's lines above, then the same make command: it goes on where it stopped"
