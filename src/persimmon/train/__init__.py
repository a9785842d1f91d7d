"""Training: recipes, loss, optimizers, schedules, the loop, pretraining and fine-tuning."""
