#!/bin/sh
# Makes one peer's environment from its list of packages; nothing is done where the list has not changed.
# usage: install_peer.sh PYTHON benchmarks/peers/NAME.txt
set -eu

python=$1 list=$2
environment=benchmarks/.peers/$(basename "$list" .txt)
if [ -f "$environment/installed" ] && cmp -s "$list" "$environment/installed"; then
    exit 0
fi
echo "installing $(tr '\n' ' ' <"$list")into $environment"
"$python" -m venv --clear "$environment"
"$environment/bin/python" -m pip --disable-pip-version-check --no-input install -qq -r "$list"
cp "$list" "$environment/installed"
