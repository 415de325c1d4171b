"""What is learned: one module for each kind of training, run by ``kernels.training``."""
