#!/bin/sh
# Builds the stages of the Dockerfile where no Docker runs, with buildah in a chroot on a base that debootstrap makes, and
# asks the image for a text as its own user on a read-only root. Needs root, buildah, debootstrap and util-linux.
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
if ! buildah inspect --type image "$base" >/dev/null 2>&1; then  # made once: every layer's cache hangs on it
    container=$(buildah from scratch)
    buildah add -q "$container" "$work/base.tar" /
    buildah commit -q --rm "$container" "$base"
fi

buildah build --layers --format docker --build-arg "BASE=$base" --tag "$image" "$@" "$here"
container=$(buildah from "$image")
root=$(buildah mount "$container")
echo "size of the image: $(du -sm "$root" | cut -f1) MB, of which the base $(du -sm "$work/base" | cut -f1) MB"
user=$(buildah inspect --format '{{.Docker.Config.User}}' "$image")
variables=$(buildah inspect --format '{{range .Docker.Config.Env}}{{.}} {{end}}' "$image")
check=$(buildah inspect --format '{{json .Docker.Config.Healthcheck.Test}}' "$image")

# As the image is run: its user, its variables, nothing writable but the cache volume and /tmp. The health check is the
# image's own.
export root user variables check
unshare --mount --fork sh -euc '
    mount --bind "$root" "$root"
    mount -o remount,bind,ro "$root"
    mount -t tmpfs none "$root/tmp"
    mount -t tmpfs -o "uid=${user%:*},gid=${user#*:},mode=755" none "$root/var/cache/dovetail"
    mount --rbind /dev "$root/dev"
    mount -t proc none "$root/proc"
    exec chroot --userspec="$user" --groups= "$root" /usr/bin/env -i $variables CHECK="$check" sh -euc "
        test \"\$(id -u)\" = ${user%:*}
        touch /var/cache/dovetail/probe
        for place in / /opt/dovetail /models /etc; do ! touch \$place/probe 2>/dev/null; done
        dovetail --version
        dovetail serve --port 18000 >/tmp/log 2>&1 &
        export DOVETAIL_PORT=18000
        cat >/tmp/ask.py
        python -I /tmp/ask.py || { cat /tmp/log; exit 1; }
        kill \$! && wait \$!
        echo ended with \$?
    "
' <<'EOF_ASK'
import json, os, subprocess, time, urllib.request
check, started = json.loads(os.environ["CHECK"])[1:], time.monotonic()
while subprocess.run(check, stderr=subprocess.DEVNULL).returncode:
    assert time.monotonic() - started < 300, "the health check never passed"
    time.sleep(0.5)
print(f"healthy after {time.monotonic() - started:.1f} s")
message = {"role": "user", "content": "Name the capital of France."}
body = json.dumps({"messages": [message], "max_tokens": 16, "temperature": 0}).encode()
call = urllib.request.Request("http://127.0.0.1:18000/v1/chat/completions", body, {"content-type": "application/json"})
answer = json.load(urllib.request.urlopen(call, timeout=60))
print(answer["model"], repr(answer["choices"][0]["message"]["content"]), answer["timings"])
while True:  # vision comes behind text
    health = json.load(urllib.request.urlopen("http://127.0.0.1:18000/health"))
    if health["vision"]["state"] == "ok" or time.monotonic() - started > 300:
        break
    time.sleep(0.5)
models = json.load(urllib.request.urlopen("http://127.0.0.1:18000/v1/models"))
print(health["status"], health["drafter"], health["vision"]["state"], [m.get("runtime") for m in models["data"]])
assert health["status"] == "ok" and health["vision"]["state"] == "ok"
EOF_ASK
buildah rm "$container" >/dev/null
