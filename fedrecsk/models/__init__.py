"""Floor 2: recommendation models over the client axis, each a set of functions on tensors."""
