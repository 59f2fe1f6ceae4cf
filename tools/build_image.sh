#!/usr/bin/env bash
# Build docker/cpu.Dockerfile where no Docker runs: with buildah, which needs no daemon, and in a
# Debian that debootstrap makes in place of the base image. Then serve a checkpoint from it.
#
#   tools/build_image.sh FOLDER [ISAS]    FOLDER gets everything (12 GB); ISAS: default avx2
#
# Needs root and Debian's packages buildah and debootstrap. Environment: WHEELS, a folder with
# torch's CPU build, if its index cannot be reached.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=$(realpath -m "${1:?usage: tools/build_image.sh FOLDER [ISAS]}")
isas=${2:-avx2}
certificates=/etc/ssl/certs/ca-certificates.crt
base=localhost/debian-by-debootstrap
mkdir -p "$folder"

# Not vfs, which copies everything below into every layer: 80 GB here.
b() { buildah --root "$folder/store" --runroot "$folder/run" --storage-driver overlay "$@"; }

if ! b inspect --type image "$base" >/dev/null 2>&1; then
  [ -e "$folder/debian/etc/debian_version" ] ||
    debootstrap --variant=minbase bookworm "$folder/debian" http://deb.debian.org/debian
  container=$(b from scratch)
  b add --quiet "$container" "$folder/debian" /
  b commit --quiet --rm "$container" "$base"
fi

printf '[global]\n%s\ncert = /host-certificates\n' "${WHEELS:+find-links = /wheels}" >"$folder/pip.conf"
b bud --pull-never --layers --isolation chroot --format docker \
  --volume "$folder/pip.conf:/etc/pip.conf:ro" \
  --volume "$certificates:/host-certificates:ro" \
  ${WHEELS:+--volume "$WHEELS:/wheels:ro"} \
  --build-arg "BASE=$base" --build-arg "ISAS=$isas" \
  --file docker/cpu.Dockerfile --tag attnserve:cpu .
container=$(b from --pull-never attnserve:cpu)
b run --isolation chroot "$container" -- python - <tools/try_image.py
b rm "$container" >/dev/null
