"""Our Metal kernels on an NVIDIA GPU: the simulator's front end, clang's NVPTX target, CuPy. README.md says how."""
