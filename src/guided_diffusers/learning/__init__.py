"""Training: data, losses, and the loop of the scripts in `training/`.

data, annotations, streaming, latents    labelled images and what is made of them
losses, classifier_losses                losses as functions of tensors
classifier_objective, warm_start         what a classifier learns, and its initial weights
options, prepare                         the options, and what a training starts with
batches, loop, ema, held_out             the loop, its random numbers, EMA, evaluation, the Hub
checkpointing, distributed               checkpoints, processes
data_checks, output_folder               what is checked before the first step
"""
