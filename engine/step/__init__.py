"""One step on the device: staging, forward, sampling, CUDA graphs, and what they take."""
