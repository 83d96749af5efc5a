#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one command, on an x86-64 machine or a Jetson:
#
#     benchmarks/gpu.sh [--smoke] [--dry-run] [--out DIR] [--bundles DIR] [--targets "..."] [--precisions "..."]
#
# Creates a virtual environment, bundles of the demo and of a model of the shape of Qwen2-0.5B with random weights, and
# their engines; then benchmarks/first_gpu.py checks and measures them, stage by stage, into DIR/results/results.json.
# The large bundles take 1 GB in fp16 and 0.3 GB in int4 for each target, the export 8 GB of memory.
#
#   --smoke       the demo alone and few repetitions, to see whether everything runs
#   --dry-run     print the commands without running them
#   --out         folder for all output (default gpu-results)
#   --bundles     folder of bundles, one per folder: nothing is exported, PyTorch is not needed, and engines are built
#                 into those for TensorRT
#   --targets     targets to measure (default "tensorrt cuda"; on a Jetson "tensorrt": onnxruntime-gpu on PyPI has no
#                 machine code for its GPUs)
#   --precisions  of the exported bundles (default "fp16 int4"; int8 is the third)
#   PYTHON=...    an interpreter whose environment has pytest and mara-deploy with the extras below; nothing is installed
#
# On a Jetson, set the power mode first (sudo nvpmodel -m ...; sudo jetson_clocks); the results record it.
set -euo pipefail
shopt -s inherit_errexit

stop() {
    echo "$1" >&2
    exit 2
}

smoke=0 dry=0 failed=0 out=gpu-results bundles='' targets='' precisions='fp16 int4'
while (($#)); do
    case $1 in
        --smoke) smoke=1 ;;
        --dry-run) dry=1 ;;
        --out | --bundles | --targets | --precisions)
            (($# > 1)) || stop "gpu.sh: $1 needs a value"
            printf -v "${1#--}" %s "$2"
            shift
            ;;
        -h | --help)
            sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
            exit
            ;;
        *) stop "gpu.sh: unknown option $1; see benchmarks/gpu.sh --help" ;;
    esac
    shift
done
# -s: keep the link, since the python it points to does not see the environment's packages
[[ ${PYTHON:-} != */* ]] || PYTHON=$(realpath -ms "$PYTHON")
root=$(cd "$(dirname "$0")/.." && pwd)
out=$(realpath -m "$out") bundles=${bundles:+$(realpath -m "$bundles")}
cd "$root"
python=${PYTHON:-python3}

# ── the board ────────────────────────────────────────────────────────────────────────────────────────────────────────

# A dry run can be for another machine: BOARD='{"kind": "jetson", "l4t": "36.4.3"}'.
((dry)) || unset BOARD
if [[ -z ${BOARD:-} ]]; then
    if ((dry)); then
        BOARD=$("$python" benchmarks/board.py 2> /dev/null) || BOARD='{"kind": "gpu"}'
    else
        BOARD=$("$python" benchmarks/board.py) || exit
    fi
fi
mapfile -t facts < <("$python" -c 'import json, sys
board = json.loads(sys.argv[1])
for name in "kind", "l4t", "driver_cuda":
    print(board.get(name) or "")' "$BOARD")
kind=${facts[0]} l4t=${facts[1]} driver_cuda=${facts[2]}

lowering=portable extras=tensorrt,cpu default=tensorrt
case $kind-$l4t in
    jetson-36.*) packages=('cuda-bindings==12.8.*' 'numpy<2') lowering=decomposed ;;
    jetson-38.*) packages=('cuda-bindings==13.0.*') lowering=decomposed ;;
    jetson-*) packages=('cuda-bindings==13.2.*') ;;
    *) extras=tensorrt,gpu packages=('onnxruntime-gpu[cuda,cudnn]') default='tensorrt cuda' ;;
esac
targets=${targets:-$default}
if [[ -z ${PYTHON:-} && $driver_cuda =~ ^([0-9]|1[0-2])\. ]]; then
    stop "gpu.sh: this driver supports CUDA $driver_cuda, but the packages need CUDA 13 (driver 580 or later): \
update the driver, or give an environment that fits with PYTHON="
fi

# ── one step at a time ───────────────────────────────────────────────────────────────────────────────────────────────

show() {
    local word line=''
    for word; do
        [[ $word =~ ^[A-Za-z0-9_=:,./-]+$ ]] || word=${word@Q}
        line+="$word "
    done
    echo "${line% }"
}

# step NAME MINUTES COMMAND…: print the command and run it for so long at most, with its output in NAME.txt.
step() {
    local name=$1 minutes=$2 command=("${@:3}")
    show "${command[@]}"
    ((dry)) && return
    [[ $3 != mara-* ]] || command=("$python" -m "mara_deploy.commands.${3#mara-}" "${@:4}")
    if timeout --foreground --kill-after 10 "${minutes}m" "${command[@]}" 2>&1 | tee "$out/$name.txt"; then
        return
    fi
    echo "gpu.sh: $name failed or took $minutes minutes, see $out/$name.txt" >&2
    failed=1
    return 1
}

must() {
    step "$@" || exit 1
}

if ((!dry)); then
    [[ ! -e $out ]] || stop "gpu.sh: $out exists already: remove it, or choose another --out"
    mkdir -p "$out"
fi

# ── environment, model, bundles, engines ─────────────────────────────────────────────────────────────────────────────

if [[ -z ${PYTHON:-} ]]; then
    options=() # on a Jetson TensorRT is a system package
    [[ $kind != jetson ]] || options=(--system-site-packages)
    must venv 5 python3 -m venv "${options[@]}" "$out/env"
    python=$out/env/bin/python
    install=("$python" -m pip install --disable-pip-version-check -q)
    if [[ -z $bundles ]]; then # the CPU build of PyTorch is enough to export, and does not pull in CUDA packages
        must torch 30 "${install[@]}" --no-deps --retries 1 --timeout 15 \
            --extra-index-url https://download.pytorch.org/whl/cpu 'torch>=2.6'
        extras+=,export
    fi
    # tests/gpu writes its graph with onnx-ir
    must packages 30 "${install[@]}" -e ".[$extras]" "${packages[@]}" pytest "onnx-ir>=1.1"
fi
export PYTHONPATH=$root:$root/export:$root/runtime${PYTHONPATH:+:$PYTHONPATH} CUDA_DEVICE_ORDER=PCI_BUS_ID

# built BUNDLE: build the engines of a bundle for TensorRT, also of small capacities that its context exceeds.
built() {
    local bundle=$1 target capacities facts
    facts=$("${PYTHON:-python3}" -c 'import json, sys
folder, name = sys.argv[1], sys.argv[1].rsplit("/", 1)[-1]
try:
    with open(folder + "/manifest.json", encoding="utf-8") as file:
        manifest = json.load(file)
except OSError:  # of a dry run
    manifest = {"targets": [name.rsplit("-", 2)[0]], "max_context": 4096}
print(*[target for target in manifest["targets"] if target.startswith("tensorrt")][-1:] or ["none"])
print(",".join(size for size in ("512", "1024") if int(size) < manifest["max_context"]))' "$bundle") || exit
    { read -r target && read -r capacities; } <<< "$facts" || true
    [[ $target == tensorrt* ]] || return 0
    step "build-${bundle##*/}" 60 mara-build "$bundle" --target "$target" ${capacities:+--capacity "$capacities"}
}

# exported MODEL TARGET PRECISION LOWERING
exported() {
    local bundle=$out/bundles/$2-$3-$1 model=demo agent=demo graph=()
    [[ $1 == demo ]] || model=$out/$1/checkpoint agent=$out/$1/agent.safetensors
    [[ $2 != tensorrt* ]] || graph=(--lowering "$4" --no-build)
    [[ $3 != int4 ]] || graph+=(--block-size 128) # smaller ones lose too much of the demo in TensorRT's form
    step "export-$2-$3-$1" 60 mara-export --model "$model" --agent "$agent" --target "$2" --precision "$3" \
        "${graph[@]}" --out "$bundle"
}

if [[ -n $bundles ]]; then
    for manifest in "$bundles"/*/manifest.json; do
        built "$(dirname "$manifest")" || true
    done
else
    models=(demo)
    ((smoke)) || { must shape 30 "$python" benchmarks/shape.py qwen2-0.5b "$out/shape" && models+=(shape); }
    for target in $targets; do
        for precision in $precisions; do
            for model in "${models[@]}"; do
                exported "$model" "$target" "$precision" "$lowering" || continue
                built "$out/bundles/$target-$precision-$model" && continue
                [[ $lowering != decomposed ]] || continue
                # TensorRT 10.16 and later may not build Attention with a mask; "decomposed" uses basic operators instead
                echo "gpu.sh: TensorRT cannot build --lowering $lowering: using decomposed" >&2
                rm -rf "$out/bundles/$target-$precision-$model"
                exported "$model" "$target" "$precision" decomposed || continue
                built "$out/bundles/$target-$precision-$model" || true
            done
        done
    done
fi

# ── check and measure ────────────────────────────────────────────────────────────────────────────────────────────────

options=(--bundles "${bundles:-$out/bundles}" --out "$out/results" --patience 10)
((!smoke)) || options+=(--smoke)
show "$python" -m benchmarks.first_gpu "${options[@]}"
((dry)) || "$python" -m benchmarks.first_gpu "${options[@]}" || failed=1
exit "$failed"
