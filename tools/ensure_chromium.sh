#!/bin/sh
# Best effort, never fails: the browser tests skip, and say what they need, where Chromium cannot be had.
# Installs only as root with apt-get (containers, CI); NO_APT=1 turns that off.

for name in chromium chromium-browser google-chrome; do
    command -v "$name" >/dev/null 2>&1 && exit 0
done
[ -z "${CHROMIUM:-}" ] && [ -z "${NO_APT:-}" ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1 || exit 0

echo "installing Chromium for the browser tests (apt-get; NO_APT=1 turns this off)"
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
{ timeout 300 apt-get update -qq && timeout 600 apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core; } \
    </dev/null >"$log" 2>&1 || { echo "no Chromium; the browser tests will skip. apt-get said:"; tail -n 3 "$log"; }
rm -f "$log"
exit 0
