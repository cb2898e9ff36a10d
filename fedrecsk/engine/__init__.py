"""Floor 2: clients and tensors. Knows nothing of recommenders."""
