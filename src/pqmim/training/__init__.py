"""Training, the only wing that is written in PyTorch: networks, data, one loop per stage, export to model files."""
