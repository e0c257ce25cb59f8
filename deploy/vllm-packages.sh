#!/bin/sh
# Install the Debian packages of vLLM: those that are named, and a C++ compiler and Python's headers where the base image
# lacks them. vLLM compiles while it starts and with its first request.
set -eu

has_headers() {
    [ -f "$(python -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ]
}

command -v g++ > /dev/null || set -- "$@" g++
has_headers || set -- "$@" python3-dev
[ $# -gt 0 ] || exit 0
apt-get update
apt-get install --yes --no-install-recommends "$@"
rm -rf /var/lib/apt/lists/*
# Debian's headers are those of Debian's Python.
has_headers || {
    echo "the Python of this base image has no headers (Python.h), and vLLM compiles with them: take another one" >&2
    exit 1
}
