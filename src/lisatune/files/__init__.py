"""Files that are read or written as a whole: plain ones, YAML, and tensors."""
