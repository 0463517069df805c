#!/bin/sh
# Light classifiers learn the probabilities and the gradients of TEACHER at every noise level, powers 1 to 8 included:
#     sh training/fashion_mnist_student.sh half_wide                  # the bundled one, 80 minutes of a core
#     STEPS=600 OUT=out/short TEACHER=out/fashion-mnist-power sh training/fashion_mnist_student.sh half full quarter
# An argument is the name of a file in training/configs/students, OUT where everything goes. half_wide starts from the
# teacher's weights, in so far as they fit. examples/benchmarks/students.py compares them. Started again, it goes on
# where it was stopped.
set -e
cd "$(dirname "$0")/.."
SOURCE=${SOURCE:-/usr/share/datasets/fashion-mnist}
OUT=${OUT:-out}
TEACHER=${TEACHER:-$OUT/fashion-mnist-power}
STEPS=${STEPS:-8000}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

test -d data/fashion-mnist || python training/prepare_fashion_mnist.py --source "$SOURCE" --output data/fashion-mnist

for name in ${@:-half_wide half quarter full}; do
    init=
    if [ "$name" = half_wide ]; then init="--init_from $TEACHER"; fi
    python training/train_classifier.py --train_data_dir data/fashion-mnist --resolution 28 --random_shift 1 \
        --model_config_name_or_path "training/configs/students/$name.json" --teacher "$TEACHER" --max_power 8 \
        --teacher_gradient_weight 1 --train_batch_size 128 --max_train_steps "$STEPS" \
        --learning_rate 2e-3 --lr_scheduler cosine --lr_warmup_steps 200 --adam_beta2 0.99 --seed 21 \
        --checkpointing_steps 250 --validation_steps 1000 --validation_samples 200 --diagnosis_images 0 \
        --resume_from_checkpoint latest --output_dir "$OUT/students/$name" $init
done
