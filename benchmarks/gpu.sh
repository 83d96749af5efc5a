#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one command, on an x86-64 machine or a Jetson:
#
#     benchmarks/gpu.sh [--smoke] [--dry-run] [--out DIR] [--bundles DIR] [--targets "tensorrt cuda"]
#
# Creates a virtual environment, a model of the shape of Qwen2-0.5B with random weights, its fp16 bundles and their
# engines. Then runs tests/gpu, mara-bench (cost of 1 to 40 rows; aligned against plain decoding with decisions at half
# of the positions and 90 % accepted), and 2,000 steps with memory and energy per token recorded. All results are
# collected in DIR/results.json.
#
#   --smoke      use a tiny model, to see whether everything runs
#   --dry-run    print the commands without running them
#   --out        folder for all output (default gpu-results)
#   --bundles    folder with one bundle per target, named by its target: PyTorch is not needed then. TensorRT engines are
#                built into these bundles
#   --targets    targets to measure (default "tensorrt cuda"; "tensorrt" on JetPack 6, whose Python has no
#                onnxruntime-gpu)
#   PYTHON=...   an interpreter whose environment has pytest and mara-deploy with the extras below; nothing is installed
#
# On a Jetson, set the power mode first (sudo nvpmodel -m ...; sudo jetson_clocks); the results record it.
set -euo pipefail
shopt -s inherit_errexit

stop() {
    echo "$1" >&2
    exit 2
}

smoke=0 dry=0 out=gpu-results bundles='' targets=''
while (($#)); do
    case $1 in
        --smoke) smoke=1 ;;
        --dry-run) dry=1 ;;
        --out | --bundles | --targets)
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

lowering=portable
case $kind-$l4t in
    jetson-36.*) extras=tensorrt,cpu packages=('cuda-bindings==12.8.*' 'numpy<2') lowering=decomposed default=tensorrt ;;
    jetson-38.*) extras=tensorrt,gpu packages=('cuda-bindings==13.0.*') lowering=decomposed ;;
    jetson-*) extras=tensorrt,gpu packages=('cuda-bindings==13.2.*') ;;
    *) extras=tensorrt,gpu packages=('onnxruntime-gpu[cuda,cudnn]') ;;
esac
targets=${targets:-${default:-tensorrt cuda}}
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

# step NAME COMMAND…: print the command, run it and keep its output. A failure is recorded and returns false.
step() {
    local name=$1 command=("${@:2}")
    show "${command[@]}"
    ((dry)) && return
    [[ $2 != mara-* ]] || command=("$python" -m "mara_deploy.commands.${2#mara-}" "${@:3}")
    if "${command[@]}" 2>&1 | tee "$out/$name.txt"; then
        return
    fi
    printf '%s\t%s\n' "$name" "$(tail -n 1 "$out/$name.txt" | tr '\r\t' '  ')" >> "$out/failed.tsv"
    return 1
}

must() {
    step "$@" || stop "gpu.sh: $1 failed, see $out/$1.txt"
}

# below BUNDLE NUMBER…: the numbers below the bundle's max_context, separated by commas; all of them without a bundle.
below() {
    "${PYTHON:-python3}" -c 'import json, sys
try:
    with open(sys.argv[1] + "/manifest.json", encoding="utf-8") as file:
        most = json.load(file)["max_context"]
    print(",".join(n for n in sys.argv[2:] if int(n) < most))
except (OSError, ValueError, KeyError, TypeError):  # the next command reports what is wrong with it
    print(",".join(sys.argv[2:]))' "$@"
}

if ((!dry)); then
    [[ ! -e $out ]] || stop "gpu.sh: $out exists already: remove it, or choose another --out"
    mkdir -p "$out"
    echo "$BOARD" > "$out/board-before.json"
fi

# ── environment, model, bundles, engines ─────────────────────────────────────────────────────────────────────────────

if [[ -z ${PYTHON:-} ]]; then
    options=() # on a Jetson TensorRT is a system package
    [[ $kind != jetson ]] || options=(--system-site-packages)
    must venv python3 -m venv "${options[@]}" "$out/env"
    python=$out/env/bin/python
    install=("$python" -m pip install --disable-pip-version-check -q)
    if [[ -z $bundles ]]; then # the CPU build of PyTorch is enough to export, and does not pull in CUDA packages
        must torch "${install[@]}" --no-deps --retries 1 --timeout 15 \
            --extra-index-url https://download.pytorch.org/whl/cpu 'torch>=2.6'
        extras+=,export
    fi
    # tests/gpu writes its graph with onnx-ir
    must packages "${install[@]}" -e ".[$extras]" "${packages[@]}" pytest "onnx-ir>=1.1"
    if ((!dry)); then # ONNX Runtime searches it for the CUDA libraries
        libraries=$("$python" -c 'import glob, sysconfig
print(":".join(glob.glob(sysconfig.get_path("purelib") + "/nvidia/*/lib")))')
        export LD_LIBRARY_PATH=$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
    fi
fi
export PYTHONPATH=$root:$root/export:$root/runtime CUDA_DEVICE_ORDER=PCI_BUS_ID

shape=qwen2-0.5b context=4096 capacities=(512 1024) bench=(--tokens 96 --rounds 9)
((!smoke)) || { shape=tiny context=512 capacities=(256) bench=(--tokens 16 --rounds 3); }

# bundled TARGET LOWERING STEP: export a bundle unless there is one, and build its engines.
bundled() {
    local target=$1 graph=() bundle=${bundles:-$out/bundles}/$1 smaller=() capacity
    if [[ -z $bundles ]]; then
        [[ $target != tensorrt* ]] || graph=(--lowering "$2" --no-build)
        step "$3-export" mara-export --model "$out/model/checkpoint" --agent "$out/model/agent.safetensors" \
            --target "$target" --precision fp16 "${graph[@]}" --max-context "$context" --out "$bundle" || return
    fi
    [[ $target == tensorrt* ]] || return 0
    capacity=$(below "$bundle" "${capacities[@]}") || exit
    [[ -z $capacity ]] || smaller=(--capacity "$capacity")
    step "$3-build" mara-build "$bundle" --target "$target" "${smaller[@]}"
}

ready=()
[[ -n $bundles ]] || must model "$python" benchmarks/shape.py "$shape" "$out/model"
for target in $targets; do
    if ! bundled "$target" "$lowering" "$target"; then
        # TensorRT 10.16 and later may not build Attention with a mask; "decomposed" uses basic operators instead
        [[ -z $bundles && $target == tensorrt* && $lowering != decomposed && -d $out/bundles/$target ]] || continue
        echo "gpu.sh: TensorRT cannot build --lowering $lowering for $target: using decomposed" >&2
        rm -rf "$out/bundles/$target"
        bundled "$target" decomposed "$target-decomposed" || continue
    fi
    ready+=("$target")
done
bundles=${bundles:-$out/bundles}

# ── conformance, speed, memory and energy ────────────────────────────────────────────────────────────────────────────

step tests env MARA_GPU_BUNDLES="$bundles" "$python" -m pytest -q -m gpu tests/gpu -o junit_family=xunit1 \
    --junitxml "$out/tests.xml" || true
for target in "${ready[@]}"; do
    step "$target-bench" mara-bench "$bundles/$target" --engine "$target" --measure steps,prefill,width,profiles \
        --profile 1 --profile 2 --profile 4 "${bench[@]}" || continue
    step "$target-soak" "$python" -m benchmarks.soak "$bundles/$target" --engine "$target" --steps 2000 || true
done

step gather "$python" -m benchmarks.gather "$out" || true
if [[ -e $out/failed.tsv ]] && ((!dry)); then
    echo "gpu.sh: failed steps:" >&2
    sed 's/\t/: /' "$out/failed.tsv" >&2
    exit 1
fi
