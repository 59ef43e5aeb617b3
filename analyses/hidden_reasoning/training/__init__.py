"""How a model comes about: `loss`, `curriculum`, `settings`, `learners`, and `train`, on transformers' `Trainer`."""
