"""The ranks of a run, and tensors divided among them."""
