#!/usr/bin/env bash
# Everything that needs a GPU, in an order that fails early: tests, sanitizers, benchmarks. About 20 minutes.
#   benchmarks/gpu.sh FOLDER     results go there, as JSON and logs
set -euo pipefail
cd "$(dirname "$0")/.."
results=${1:?name a folder for the results}
mkdir -p "$results"
python=${PYTHON:-python3}

say() { printf '\n== %s\n' "$*"; }
# Kernels are compiled at first use, which several processes do at once where pytest-xdist is there.
parallel=$("$python" -c 'import xdist' 2> /dev/null && echo "-n 6" || true)
tests() { "$python" -m pytest -q --no-header -p no:cacheprovider --hypothesis-profile=thorough -m gpu "$@"; }
bench() { "$python" -c 'from larosa.cli.main import main; main()' bench "$@"; }

say "Kernels in CUDA C++"
tests $parallel -x -k "not triton" tests/ops/gpu
say "Graphs"
tests -x tests/decoding/test_cuda_graph.py
say "Everything else"
tests --ignore tests/ops/gpu --ignore tests/decoding/test_cuda_graph.py tests | tee "$results/tests.log"

say "Memory and races"
chosen="long_vectors or counted_list or read_meanwhile or large_sizes or parts_of or test_heads or test_positions or rms_norm or silu_mul"
chosen="not triton and not fused and not any_size and ($chosen or (one_block_selects_for_all and 4096))"
for tool in memcheck racecheck; do
    sanitizer=(compute-sanitizer --error-exitcode 9 --report-api-errors no --target-processes all --tool $tool)
    "${sanitizer[@]}" "$python" benchmarks/steps.py cuda llama-3-8b llama-2-7b | tee "$results/$tool-steps.log"
    "${sanitizer[@]}" "$python" -m pytest -q --no-header -p no:cacheprovider --hypothesis-profile=thorough \
        -m gpu -k "$chosen" tests/ops/gpu |
        tee "$results/$tool.log"
done

say "Benchmarks"
bench kernels --device cuda --shape llama-2-7b --json "$results/kernels-llama-2-7b.json"
bench decode --device cuda --shape llama-2-7b --sparsity 0,0.25,0.5,0.75 --tokens 256 --json "$results/decode-llama-2-7b.json"
bench decode --device cuda --shape llama-3-8b --dtype bfloat16 --sparsity 0,0.25,0.5,0.75 --tokens 256 \
    --json "$results/decode-llama-3-8b.json"
bench decode --device cuda --shape llama-2-7b --selection threshold --sparsity 0.25,0.5,0.75 --tokens 256 \
    --json "$results/decode-llama-2-7b-thresholds.json"
for tokens in 128 512 2048; do
    bench decode --device cuda --shape llama-2-7b --sparsity 0.5 --tokens $tokens --json "$results/decode-$tokens-tokens.json"
done
for shape in mistral-7b qwen2.5-7b; do
    bench decode --device cuda --shape $shape --sparsity 0.5 --tokens 256 --json "$results/decode-$shape.json"
done
for weights in int4 int8; do
    bench kernels --device cuda --shape llama-3-8b --weights $weights --json "$results/kernels-llama-3-8b-$weights.json"
    for shape in llama-3-8b llama-2-7b; do
        bench decode --device cuda --shape $shape --dtype bfloat16 --weights $weights --layers-per-rotation 32 \
            --sparsity 0.25,0.5 --tokens 256 --json "$results/decode-$shape-$weights.json"
    done
done
"$python" benchmarks/rows.py --shape llama-3-8b | tee "$results/rows-llama-3-8b.log"
bench decode --device cuda --shape llama-3-8b --lossless --draft int4 --sparsity 0,0.25,0.5 --acceptance 0.9,0.85,0.6 \
    --json "$results/lossless-llama-3-8b.json"
bench decode --device cuda --shape llama-3-70b --layers 4 --sparsity 0.5 --tokens 128 --json "$results/decode-llama-3-70b-4-layers.json"

say "Kernels in Triton"
tests $parallel -k "triton and not longest" tests/ops/gpu
