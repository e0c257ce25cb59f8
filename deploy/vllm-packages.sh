#!/bin/sh
# Install the Debian packages of vLLM: those that are named, and a C++ compiler and Python's headers where the base image
# lacks them. vLLM compiles while it starts and with its first request. python:3.11-slim has the headers and no compiler,
# python:3.11 has both, Debian's own Python has neither.
set -eu
command -v g++ > /dev/null || set -- "$@" g++
[ -f "$(python -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ] || set -- "$@" python3-dev
[ $# -gt 0 ] || exit 0
apt-get update
apt-get install --yes --no-install-recommends "$@"
rm -rf /var/lib/apt/lists/*
