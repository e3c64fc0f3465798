"""Settings, recipes and the trainer, from texts to the optimizer's step."""
