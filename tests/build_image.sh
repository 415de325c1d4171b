#!/bin/sh
# Builds the stages of the Dockerfile where no Docker runs, with buildah in a chroot on a base that debootstrap makes, and
# asks the image for a text as its own user on a read-only root. Needs root, buildah and debootstrap.
#   tests/build_image.sh [WORK_FOLDER] [ARGUMENTS OF buildah build...]     e.g. --build-arg LLAMA_CPP= --target cpu
set -eu
work=${1:-/tmp/dovetail-image}
[ $# -eq 0 ] || shift
here=$(cd "$(dirname "$0")/.." && pwd)
base=localhost/dovetail-base image=localhost/dovetail:cpu
mkdir -p "$work"
export BUILDAH_ISOLATION=chroot STORAGE_DRIVER=${STORAGE_DRIVER:-overlay}

if [ ! -e "$work/base.tar" ]; then
    debootstrap --variant=minbase --include=ca-certificates,python3,python3-pip,python3-venv bookworm "$work/base" \
        http://deb.debian.org/debian
    ln -s python3 "$work/base/usr/bin/python"
    rm -f "$work"/base/usr/lib/python3*/EXTERNALLY-MANAGED "$work"/base/var/cache/apt/archives/*.deb
    tar -C "$work/base" -cf "$work/base.tar" .
fi
container=$(buildah from scratch)
buildah add -q "$container" "$work/base.tar" /
buildah commit -q --rm "$container" "$base"

buildah build --layers --build-arg "BASE=$base" --tag "$image" "$@" "$here"
container=$(buildah from "$image")
root=$(buildah mount "$container")
echo "size of the image: $(du -sm "$root" | cut -f1) MB, of which the base $(du -sm "$work/base" | cut -f1) MB"

# As the image is run: its user, nothing writable but the cache and /tmp, and the health check's own words.
buildah run "$container" -- sh -euc '
    test "$(id -u)" = 10001
    touch /var/cache/dovetail/probe
    ! touch /opt/dovetail/probe 2>/dev/null
    dovetail --version
    dovetail serve --port 18000 >/tmp/log 2>&1 &
    for second in $(seq 300); do
        sleep 1
        python -Ic "import urllib.request as u; u.urlopen(\"http://127.0.0.1:18000/health\", timeout=4)" 2>/dev/null && break
    done
    python -Ic "
import json, urllib.request as u
body = json.dumps({\"prompt\": \"The capital of France is\", \"max_tokens\": 8, \"temperature\": 0}).encode()
call = u.Request(\"http://127.0.0.1:18000/v1/completions\", body, {\"content-type\": \"application/json\"})
print(json.load(u.urlopen(call, timeout=60))[\"choices\"][0][\"text\"])
print(json.load(u.urlopen(\"http://127.0.0.1:18000/health\"))[\"vision\"])
" || { cat /tmp/log; exit 1; }
    kill %1 2>/dev/null || kill $!
'
buildah rm "$container" >/dev/null
