#!/usr/bin/env bash
# Build the image and convert a tiny model in it, for real but without a Docker engine: buildah in a
# chroot, on a Debian made by debootstrap. Needs root and `apt-get install buildah debootstrap`.
#
#   bash tests/container.sh [install-only]
#
# The pip settings of this machine are mounted for the build; nothing of them stays in the image.
set -euo pipefail
cd "$(dirname "$0")/.."

make --silent venv
work=$(mktemp -d)
export BUILDAH_ISOLATION=chroot STORAGE_DRIVER=vfs
buildah_here() { buildah --root "$work/storage" --runroot "$work/run" "$@"; }
clean_up() {
    buildah_here umount --all > /dev/null 2>&1 || true
    buildah_here rm --all > /dev/null 2>&1 || true
    rm -rf "$work"
}
trap clean_up EXIT
trap 'echo "failed at line $LINENO: $BASH_COMMAND" >&2' ERR

echo "== base image: Debian bookworm"
base=$(buildah_here from scratch)
debootstrap --variant=minbase bookworm "$(buildah_here mount "$base")" > "$work/debootstrap.log"
buildah_here umount "$base" > /dev/null
buildah_here commit --quiet "$base" localhost/bookworm > /dev/null

echo "== image"
# `pip config list` prints global.name='value' and :env:.name='value'. The files it names are mounted
# below /mnt: at their own path they would be in the way of packages that the build installs.
{
    echo "[global]"
    .venv/bin/python -m pip config list 2> /dev/null \
        | sed -nE "s/^[^ =]+\.([a-z-]+)='(.*)'$/\1 = \2/p" | sort --unique --field-separator='=' --key=1,1
} > "$work/pip.conf"
mounts=(--volume "$work/pip.conf:/etc/pip.conf:ro")
for path in $(grep -oE '/[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)+' "$work/pip.conf" | sed 's#/simple$##' | sort --unique); do
    if [ -e "$path" ]; then
        mounts+=(--volume "$path:/mnt$path:ro")
        sed -i -E "s#([^A-Za-z0-9._-]/{0,2})$path(/simple)?( |\$)#\1/mnt$path\2\3#g" "$work/pip.conf"
    fi
done
time buildah_here bud --network host --tag localhost/rolora \
    --build-arg BASE_IMAGE=localhost/bookworm --build-arg TORCH_INDEX= "${mounts[@]}" .

mkdir "$work/models"
chmod 777 "$work/models"
container=$(buildah_here from localhost/rolora)
inside() { buildah_here run --network none --env OMP_NUM_THREADS=1 --volume "$work/models:/work" "$container" -- "$@"; }

echo "== who runs, and what starts"
test "$(inside id -u)" = 1000
buildah_here inspect --format '{{.OCIv1.Config.Entrypoint}} {{.OCIv1.Config.User}}' "$container"
test -z "$(inside cat /etc/pip.conf)"  # an empty mount point is all that is left of it
inside python -c "import deploy.loading, reslora, rolora, onnxruntime, onnxruntime_genai, torch; print(torch.__version__)"
inside sh -c "du -sh /opt/rolora"
if [ "${1:-}" = install-only ]; then exit; fi
inside rolora --help

echo "== a tiny model from a mounted directory"
.venv/bin/python - "$work/models/tiny" <<'PYTHON'
import sys

sys.path.insert(0, "tests")
from conftest import build_tiny_model, build_tiny_tokenizer

build_tiny_model("llama", attention_bias=True, head_dim=16).save_pretrained(sys.argv[1])
build_tiny_tokenizer().save_pretrained(sys.argv[1])
PYTHON
chmod -R a+rX "$work/models/tiny"
inside rolora merge-rotate-quantize --model tiny --rotate r1,r2,r4 --scheme W8A8 --output quantized
inside rolora export --format onnx --checkpoint quantized --output onnx
inside rolora run --model onnx --prompt hello --max-new-tokens 4
ls -ln "$work/models/onnx"
test "$(stat --format %u "$work/models/onnx")" = 1000
echo "== done"
