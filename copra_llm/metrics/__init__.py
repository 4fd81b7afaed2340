"""Scripts for `evaluate.load(path)`: scores of written answers, without a network."""
