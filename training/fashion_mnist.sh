#!/bin/sh
# The bundled Fashion-MNIST models, from the idx files to the folder that the package ships: `sh training/fashion_mnist.sh`.
# SOURCE is the folder of the four idx files, OUT where everything goes. Started again, it goes on where it was stopped.
# The three trainings don't need each other: side by side they take the time of the longest.
set -e
cd "$(dirname "$0")/.."
SOURCE=${SOURCE:-/usr/share/datasets/fashion-mnist}
OUT=${OUT:-out}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

test -d data/fashion-mnist || python training/prepare_fashion_mnist.py --source "$SOURCE" --output data/fashion-mnist

python training/train_unet.py --train_data_dir data/fashion-mnist --resolution 28 \
    --model_config_name_or_path training/configs/fashion_mnist_unet.json \
    --class_conditional --label_dropout 0.15 --prediction_type v_prediction \
    --mixed_precision bf16 --train_batch_size 64 --max_train_steps 5250 \
    --learning_rate 6e-4 --lr_warmup_steps 300 --adam_beta2 0.99 \
    --checkpointing_steps 250 --validation_steps 1000 --validation_samples 1000 \
    --resume_from_checkpoint latest --output_dir "$OUT/fashion-mnist-unet"

python training/train_classifier.py --train_data_dir data/fashion-mnist --resolution 28 --random_shift 1 \
    --model_config_name_or_path training/configs/fashion_mnist_classifier.json \
    --mixed_precision bf16 --train_batch_size 128 --max_train_steps 6250 \
    --learning_rate 6e-4 --lr_warmup_steps 300 --adam_beta2 0.99 --seed 1 \
    --checkpointing_steps 250 --validation_steps 1000 --validation_samples 5000 \
    --resume_from_checkpoint latest --output_dir "$OUT/fashion-mnist-classifier"

# The bundled one goes on from there, to a learning rate of 0.
OUT="$OUT" sh training/recipes.sh plain

# The judge: other weights, another architecture, clean images only. It is never used for guidance.
python training/train_classifier.py --train_data_dir data/fashion-mnist --resolution 28 --random_shift 2 --random_flip \
    --model_config_name_or_path training/configs/fashion_mnist_judge.json --max_timestep 0 \
    --mixed_precision bf16 --train_batch_size 128 --max_train_steps 5000 \
    --learning_rate 1e-3 --lr_warmup_steps 300 --adam_beta2 0.99 --seed 2 \
    --checkpointing_steps 250 --validation_steps 1000 --validation_samples 10000 \
    --resume_from_checkpoint latest --output_dir "$OUT/fashion-mnist-judge"

# CLIP of noisy images, for guidance by captions; it starts from the classifier.
python training/train_clip.py --train_data_dir data/fashion-mnist --resolution 28 --random_shift 1 \
    --captions training/configs/fashion_mnist_captions.json \
    --text_config training/configs/fashion_mnist_clip_text.json --image_encoder "$OUT/fashion-mnist-classifier" \
    --mixed_precision bf16 --train_batch_size 128 --max_train_steps 1750 \
    --learning_rate 6e-4 --lr_warmup_steps 300 --adam_beta2 0.99 --seed 3 \
    --checkpointing_steps 250 --validation_steps 500 \
    --resume_from_checkpoint latest --output_dir "$OUT/fashion-mnist-clip"

python training/bundle.py --unet "$OUT/fashion-mnist-unet" --classifier "$OUT/recipes/plain" \
    --judge "$OUT/fashion-mnist-judge" --clip "$OUT/fashion-mnist-clip" --output "$OUT/fashion-mnist"
python examples/benchmarks/quality_cost.py --reference data/fashion-mnist --model "$OUT/fashion-mnist" \
    --judge "$OUT/fashion-mnist/judge" --part preset --output "$OUT/preset"
python training/bundle.py --preset "$OUT/preset/preset.json" --modes training/configs/fashion_mnist_modes.json \
    --output "$OUT/fashion-mnist"

# The classifier learns powers 1 to 8, and a light one learns from it.
SOURCE="$SOURCE" OUT="$OUT" sh training/fashion_mnist_power.sh
SOURCE="$SOURCE" OUT="$OUT" sh training/fashion_mnist_student.sh half_wide
python training/bundle.py --classifier "$OUT/students/half_wide" --output "$OUT/fashion-mnist"
