#!/bin/sh
# The bundled classifier learns powers 1 to 8, for `guidance_power`; its own probabilities without noise are the targets.
# (A START that knows powers would itself be shown the noisy images.) START is the classifier to start from and the teacher, OUT where everything goes. Started again, it goes on where it
# was stopped. It takes three quarters of an hour on one CPU core with bfloat16.
set -e
cd "$(dirname "$0")/.."
SOURCE=${SOURCE:-/usr/share/datasets/fashion-mnist}
OUT=${OUT:-out}
START=${START:-$OUT/recipes/plain}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

test -d data/fashion-mnist || python training/prepare_fashion_mnist.py --source "$SOURCE" --output data/fashion-mnist

python training/train_classifier.py --train_data_dir data/fashion-mnist --resolution 28 --random_shift 1 \
    --init_from "$START" --teacher "$START" --max_power 8 \
    --mixed_precision bf16 --train_batch_size 128 --max_train_steps 3000 \
    --learning_rate 4e-4 --lr_scheduler cosine --lr_warmup_steps 200 --adam_beta2 0.99 --seed 17 \
    --checkpointing_steps 250 --validation_steps 1000 --validation_samples 2000 \
    --resume_from_checkpoint latest --output_dir "$OUT/fashion-mnist-power"
