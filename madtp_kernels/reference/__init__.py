"""What every op means, in plain PyTorch: the oracle of every test. Runs anywhere, in float64 too, and is never fast."""
