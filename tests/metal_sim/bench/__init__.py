"""Traffic and operations of the kernels, counted by the simulator, and a model of the time these take on a Mac."""
