#!/bin/sh
# The bundled emoji models, from the npm packages to the folder that the package ships: `sh examples/emoji/train.sh`.
# SOURCE is the folder of the packages' .tgz files (fetched if they aren't there), DATA that of the dataset, OUT where
# everything goes; PARTS are the trainings to run. Started again, it goes on where it was stopped.
set -e
cd "$(dirname "$0")/../.."
SOURCE=${SOURCE:-data/emoji-npm}
DATA=${DATA:-data/emoji}
OUT=${OUT:-out/emoji}
UNET_STEPS=${UNET_STEPS:-16000}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
CONFIGS=examples/emoji/configs
OPTIONS="--train_data_dir $DATA --resolution 32 --cache_images --mixed_precision bf16 --adam_beta2 0.99 --no_progress
    --checkpointing_steps 250 --validation_samples 380 --resume_from_checkpoint latest"

test -d "$DATA" || python examples/emoji/prepare.py --source "$SOURCE" --output "$DATA"

for part in ${PARTS:-unet judge classifier vendor clip}; do
    case $part in
        # The label is the category. Pictures aren't mirrored: most have a left and a right.
        unet) python training/train_unet.py $OPTIONS --random_shift 1 --random_scale 0.1 \
            --model_config_name_or_path $CONFIGS/unet.json \
            --class_conditional --label_column category --label_dropout 0.2 --prediction_type v_prediction \
            --train_batch_size 32 --max_train_steps $UNET_STEPS --learning_rate 5e-4 --lr_warmup_steps 300 \
            --validation_steps 2000 --sample_images 90 --output_dir "$OUT/unet" ;;
        # Clean images only; it never guides.
        judge) python training/train_classifier.py $OPTIONS --random_flip --random_shift 3 --random_scale 0.2 \
            --model_config_name_or_path $CONFIGS/judge.json --max_timestep 0 --label_column category --mixup 0.2 \
            --train_batch_size 64 --max_train_steps 900 --learning_rate 2e-3 --lr_scheduler cosine \
            --lr_warmup_steps 100 --seed 2 --validation_steps 0 --diagnosis_images 0 --output_dir "$OUT/judge" ;;
        # Its first layers are those of the network.
        classifier) python training/train_classifier.py $OPTIONS --random_flip --random_shift 2 --random_scale 0.15 \
            --model_config_name_or_path $CONFIGS/classifier.json --init_from "$OUT/unet" --label_column category \
            --train_batch_size 64 --max_train_steps 700 --learning_rate 8e-4 --lr_scheduler cosine \
            --lr_warmup_steps 100 --seed 1 --validation_steps 0 --diagnosis_images 0 --output_dir "$OUT/classifier" ;;
        vendor) python training/train_classifier.py $OPTIONS --random_flip --random_shift 2 --random_scale 0.15 \
            --model_config_name_or_path $CONFIGS/vendor.json --label_column vendor \
            --train_batch_size 64 --max_train_steps 1600 --learning_rate 2e-3 --lr_scheduler cosine \
            --lr_warmup_steps 100 --seed 4 --validation_steps 0 --diagnosis_images 0 --output_dir "$OUT/vendor" ;;
        clip) python training/train_clip.py $OPTIONS --random_shift 2 --random_scale 0.15 \
            --model_config_name_or_path $CONFIGS/clip_image.json --text_config $CONFIGS/clip_text.json \
            --caption_column caption --train_batch_size 64 --max_train_steps 700 --learning_rate 1e-3 \
            --lr_scheduler cosine --lr_warmup_steps 100 --seed 3 --validation_steps 0 --output_dir "$OUT/clip" ;;
        *) echo "PARTS: $part; unet, judge, classifier, vendor and clip are allowed" >&2; exit 2 ;;
    esac
done
