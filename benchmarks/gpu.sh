#!/usr/bin/env bash
# All that needs an NVIDIA GPU, in one command, on an x86-64 machine or a Jetson:
#
#     benchmarks/gpu.sh [--smoke] [--dry-run] [--out DIR] [--bundles DIR] [--targets "tensorrt cuda"]
#
# makes an environment (or takes the one of PYTHON=…, which must have pytest and mara-deploy with the extras that are
# installed below), a model of the shape of Qwen2-0.5B with random weights, its bundles in fp16 and their engines; then
# runs tests/gpu, mara-bench (cost of 1 to 40 rows; aligned against plain with half of the positions decisions and 90 %
# accepted), and 2,000 steps under watch (memory, energy a token). All that was found ends in DIR/results.json.
#
#   --smoke      a tiny model: does it run at all?
#   --dry-run    print the commands and run none
#   --out        where everything goes (default gpu-results)
#   --bundles    folder of bundles made elsewhere, one for each target by its name: then PyTorch is not needed here;
#                TensorRT's engines are built into them
#   --targets    what to measure (default "tensorrt cuda"; "tensorrt" on JetPack 6, whose Python has no onnxruntime-gpu)
#
# On a Jetson, set the power mode first (sudo nvpmodel -m …; sudo jetson_clocks): the result records what it is.
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
        *) stop "gpu.sh: there is no option $1; see benchmarks/gpu.sh --help" ;;
    esac
    shift
done
# -s: an environment's python is a link, and what it leads to has not the environment's packages
[[ ${PYTHON:-} != */* ]] || PYTHON=$(realpath -ms "$PYTHON")
root=$(cd "$(dirname "$0")/.." && pwd)
out=$(realpath -m "$out") bundles=${bundles:+$(realpath -m "$bundles")}
cd "$root"
python=${PYTHON:-python3}

# ── the board ────────────────────────────────────────────────────────────────────────────────────────────────────────

# A dry run may be of another machine: BOARD='{"kind": "jetson", "l4t": "36.4.3"}'.
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
    stop "gpu.sh: this driver knows CUDA $driver_cuda, and what would be installed needs 13 (driver 580 or later): \
update it, or name an environment that fits with PYTHON="
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

# step NAME COMMAND…: show the command and run it; what it prints is kept. A step that fails is noted, and returns false.
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

# below BUNDLE NUMBER…: those of the numbers that are less than the bundle's max_context, with commas between them; all
# of them while there is no bundle.
below() {
    "${PYTHON:-python3}" -c 'import json, sys
try:
    with open(sys.argv[1] + "/manifest.json", encoding="utf-8") as file:
        most = json.load(file)["max_context"]
    print(",".join(n for n in sys.argv[2:] if int(n) < most))
except (OSError, ValueError, KeyError, TypeError):  # who reads the bundle next says what is wrong with it
    print(",".join(sys.argv[2:]))' "$@"
}

if ((!dry)); then
    [[ ! -e $out ]] || stop "gpu.sh: $out is there already: name another folder with --out, or remove it"
    mkdir -p "$out"
    echo "$BOARD" > "$out/board-before.json"
fi

# ── environment, model, bundles, engines ─────────────────────────────────────────────────────────────────────────────

if [[ -z ${PYTHON:-} ]]; then
    options=() # TensorRT comes with JetPack, so the environment on a Jetson sees the system's packages
    [[ $kind != jetson ]] || options=(--system-site-packages)
    must venv python3 -m venv "${options[@]}" "$out/env"
    python=$out/env/bin/python
    install=("$python" -m pip install --disable-pip-version-check -q)
    if [[ -z $bundles ]]; then # PyTorch for the CPU is enough to export, and CUDA's own packages stay apart from it
        must torch "${install[@]}" --no-deps --retries 1 --timeout 15 \
            --extra-index-url https://download.pytorch.org/whl/cpu 'torch>=2.6'
        extras+=,export
    fi
    must packages "${install[@]}" -e ".[$extras]" "${packages[@]}" pytest "onnx-ir>=1.1" # tests/gpu writes its graph with it
    if ((!dry)); then # ONNX Runtime looks for CUDA's libraries there
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
        # TensorRT from 10.16 on may build no Attention with a mask; "decomposed" has plain operators in its place
        [[ -z $bundles && $target == tensorrt* && $lowering != decomposed && -d $out/bundles/$target ]] || continue
        echo "gpu.sh: no engine of lowering $lowering for $target: it is measured with decomposed instead" >&2
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
    echo "gpu.sh: not everything worked:" >&2
    sed 's/\t/: /' "$out/failed.tsv" >&2
    exit 1
fi
