#!/usr/bin/env bash
# Make a node ready, from the root of the repository: packages, and runs/ and data/ on the disk that all nodes share.
# Idempotent; quick on an image built from cluster/Dockerfile, which holds the packages of the same constraints.txt.
set -euo pipefail
cd "$(dirname "$0")/.."
shared="${SCLDM_HOME:-/shared}"

mountpoint -q "$shared" || { echo "$shared is not mounted: every node must see one file system there" >&2; exit 2; }
mkdir -p "$shared/runs" "$shared/data"
for name in runs data; do
  [ -e "$name" ] && [ ! -L "$name" ] && { echo "$PWD/$name is in the way of a link to $shared/$name" >&2; exit 2; }
  ln -sfn "$shared/$name" "$name"
done

want="$(sha256sum constraints.txt | cut -d' ' -f1)"
[ "$(cat /opt/scldm-constraints.sha256 2>/dev/null)" = "$want" ] || {
  python -m pip uninstall --yes --quiet scldm # the name of this distribution up to 0.2
  python -m pip install --quiet --no-cache-dir --constraint constraints.txt '.[pipeline]'
}
