#!/bin/sh
# Ways to go on training a classifier, from the weights that fashion_mnist.sh gives:
#     sh training/recipes.sh              # all of them
#     sh training/recipes.sh plain        # the bundled one
# examples/benchmarks/recipes_table.py compares what they give. Started again, it goes on where it was stopped.
set -e
cd "$(dirname "$0")/.."
OUT=${OUT:-out}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

for name in ${@:-plain smooth_mixup second_moment dlsm}; do
    case $name in
        plain) options= ;;
        smooth_mixup) options="--label_smoothing 0.1 --mixup 0.2" ;;
        second_moment) options="--timestep_sampler second_moment" ;;
        dlsm) options="--dlsm_weight 100 --score_model src/guided_diffusers/bundled/fashion-mnist" ;;
        *) echo "recipe $name: plain, smooth_mixup, second_moment and dlsm are allowed" >&2; exit 2 ;;
    esac
    python training/train_classifier.py --train_data_dir data/fashion-mnist --resolution 28 --random_shift 1 \
        --init_from "$OUT/fashion-mnist-classifier" --mixed_precision bf16 --train_batch_size 128 \
        --max_train_steps 1000 --learning_rate 3e-4 --lr_scheduler cosine --lr_warmup_steps 100 --adam_beta2 0.99 \
        --seed 11 --checkpointing_steps 250 --validation_steps 1000 --validation_samples 5000 \
        --resume_from_checkpoint latest --output_dir "$OUT/recipes/$name" $options
done
