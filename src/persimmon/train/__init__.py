"""Training: pretraining and fine-tuning loops, optimizers, schedules, checkpoints."""
