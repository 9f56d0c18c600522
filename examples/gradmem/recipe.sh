#!/usr/bin/env bash
# A memory that stores two pairs by one gradient step, in minutes on a CPU: second order learns it, first order and none
# do not, and the same model with the context in its prompt does so more slowly.
#
#   examples/gradmem/recipe.sh [folder] [seed ...]
set -euo pipefail
out=${1:-out/gradmem_recipe}
shift || true
seeds=${*:-0 1}

# Keys and values of one character from an alphabet of 4: training sees nearly all the 192 contexts there are, so what
# is shown is storing and retrieving. The check is the exact match with another row's context, which the last line of
# each run tells: it must be that of a guess, 0.25.
run() {
  local name=$1 seed=$2
  shift 2
  hf-gradtools gradmem train --exp_path "$out/$name-$seed" --seed "$seed" --data_path N2-K1V1-V4 \
    --base_model llama --n_embd 64 --n_layer 2 --n_head 4 --queries_per_context 2 \
    --n_mem_tokens 4 --K 1 --inner_lr 4.0 --learn_inner_lr --inner_lr_multiplier 20 --use_write_head \
    --learning_rate 2e-3 --warmup_steps 50 --adam_beta2 0.99 --per_device_batch_size 32 \
    --max_steps 1500 --eval_steps 50 --eval_rows 500 --logging_steps 50 "$@"
}

for seed in $seeds; do
  run second "$seed" --grad_mode second
  run first "$seed" --grad_mode first
  run none "$seed" --grad_mode none
  run vanilla "$seed" --vanilla
done
hf-gradtools gradmem plot --results "$out"/*-*
