#!/usr/bin/env bash
# Chromium, Node.js, and two packages of the npm registry. Root on Debian gets the first two by apt.
set -euo pipefail
cd "$(dirname "$0")"
lacks=()
command -v "${CHROMIUM:-chromium}" >/dev/null || lacks+=(chromium)
command -v node >/dev/null || lacks+=(nodejs)
command -v npm >/dev/null || lacks+=(npm)
if [ ${#lacks[@]} -gt 0 ]; then
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        echo "the browser test needs ${lacks[*]}; install them: sudo apt-get install ${lacks[*]}" >&2
        exit 1
    fi
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${lacks[@]}"
fi
if [ "$(node -p 'process.versions.node.split(".")[0]')" -lt 20 ]; then
    echo "the browser test needs Node.js 20 or later; $(node --version) is here" >&2
    exit 1
fi
if ! [ -d node_modules/playwright-core ] || ! [ -d node_modules/axe-core ]; then
    npm install --no-audit --no-fund --loglevel=error
fi
