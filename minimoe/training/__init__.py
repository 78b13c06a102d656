"""Training: a corpus that anyone can rebuild offline, its tokenizer, n-gram baselines, and the training loop."""
