#!/usr/bin/env bash
# All that there is to measure on a machine with a GPU, in nine minutes. In an environment that has the requirements:
#
#     OUT=results bash tests/benchmarks/gpu.sh
#     OUT=results SMALL=1 bash tests/benchmarks/gpu.sh    # a rehearsal in four minutes, on a machine without a GPU too
#
# Each part writes into $OUT as it goes, so that a machine that is taken away early leaves what it has done:
#
#     machine.txt      GPU, CPU, versions, commit
#     test_cuda.txt    the tests that need a GPU
#     speed.txt        update_speed.py: updates, actions, training and memory of all five scripts, eager and captured
#     mst_362m.txt     the same of MST's largest preset, in float32 and in bfloat16
#     runs.tar.gz      csv, json and png of the runs below, one to a core, which train on the CPU meanwhile; their logs
#
# PYTHON: the interpreter (python). CORES: cores that measure, the others train (6).
set -u
cd "$(dirname "$0")/../.."
python=${PYTHON:-python} cores=${CORES:-6} out=$(mkdir -p "${OUT:?a folder for the results}" && cd "$OUT" && pwd)
work=$(mktemp -d)

# Runs of the result pages at further seeds: small enough for eight minutes. As many as cores are left, the first first.
runs=(
    "nbsp.py --quick --method nbsp --seed 6"
    "nbsp.py --quick --method sac --seed 6"
    "mst_rigl.py --env-id dmc/cheetah-run --width-scale 0.25 --total-steps 20000 --seed 1"
    "mst_rigl.py --env-id dmc/cheetah-run --width-scale 0.25 --total-steps 20000 --seed 1 --preset mrq"
    "nbsp.py --quick --method replay --seed 6"
    "nbsp.py --quick --method mask --seed 6"
    "nbsp.py --quick --method nbsp --mask-neurons random --seed 6"
    "mst_rigl.py --env-id dmc/ball_in_cup-catch --width-scale 0.25 --total-steps 20000 --seed 1"
    "mst_rigl.py --env-id dmc/ball_in_cup-catch --width-scale 0.25 --total-steps 20000 --seed 1 --preset mrq"
    "nbsp.py --quick --method nbsp --seed 7"
)
speed=(--device cuda --threads 4 --workers $((cores - 1)) --end-to-end 3 --variants "SAC" "CleanRL's SAC" "NBSP"
    "TD3" "CleanRL's TD3" "NE, density 0.2" "MR.Q, dense" "MST" "MST, bf16" "SAC, dense 4x1024" "SSDE, task 2"
    "shared, dense" "shared, GMP actor" "MOORE, GMP both")
largest=(--device cuda --threads 4 --repeats 5 --scripts mst_scale --variants "width 5, depth 4" "width 5, depth 4, bf16")
stop=490 patience=40 # seconds from the start to the runs' SIGTERM; and until they have left a checkpoint
if [ -n "${SMALL:-}" ]; then
    cores=1 runs=("nbsp.py --quick --method sac --seed 6" "mst_rigl.py --quick") stop=240
    speed=(--scripts nbsp --variants "SAC" "CleanRL's SAC" --repeats 2 --end-to-end 1)
    largest=(--scripts mst_scale --variants "width 1" --repeats 1)
fi

export OMP_NUM_THREADS=1
last=$(($(env -u OMP_NUM_THREADS nproc) - 1)) pids=() # nproc believes that variable
measuring=0-$((cores - 1 < last ? cores - 1 : last))

part() { # name, seconds at most, command: what it prints goes into $out/name.txt
    local file=$out/$1.txt limit=$(($2 < stop - SECONDS ? $2 : stop - SECONDS))
    shift 2
    echo "\$ $*" > "$file"
    if ((limit < 10)); then
        echo "no time left" >> "$file"
        return
    fi
    timeout -k 5 "$limit" taskset -c "$measuring" "$@" >> "$file" 2>&1
    echo "exit $?, at $SECONDS s" >> "$file"
    echo "$file: $(tail -n 1 "$file")"
}

{
    nvidia-smi
    lscpu | grep -E "Model name|^CPU\(s\)"
    "$python" -c "import sys, torch; print('Python', sys.version.split()[0], 'PyTorch', torch.__version__)"
    git log -1 --format="commit %h %s"
} > "$out/machine.txt" 2>&1

core=$cores
for run in "${runs[@]}"; do
    if ((core > last)); then
        echo "no core for: $run"
        continue
    fi
    name=$(tr -s ' -/' '_' <<< "${run/.py/}")
    CUDA_VISIBLE_DEVICES="" taskset -c "$core" "$python" $run --device cpu --quiet --run-dir "$work/$name" \
        > "$work/$name.log" 2>&1 &
    pids+=($!) core=$((core + 1))
done
trap 'kill -TERM "${pids[@]}" 2> /dev/null' EXIT

part test_cuda 240 "$python" -m pytest -o addopts="-ra --import-mode=importlib" -p no:cacheprovider -v tests/test_cuda.py
part speed 270 "$python" tests/benchmarks/update_speed.py "${speed[@]}"
part mst_362m 70 "$python" tests/benchmarks/update_speed.py "${largest[@]}"

while ((SECONDS < stop)) && kill -0 "${pids[@]}" 2> /dev/null; do sleep 1; done
kill -TERM "${pids[@]}" 2> /dev/null
while ((SECONDS < stop + patience)) && [ -n "$(jobs -rp)" ]; do sleep 1; done
kill -KILL "${pids[@]}" 2> /dev/null
find "$work" -name "*.csv" -o -name "*.json" -o -name "*.png" -o -name "*.log" | sed "s|^$work/||" |
    tar -czf "$out/runs.tar.gz" -C "$work" -T -
rm -r "$work"
ls -l "$out"
