"""What fits a Mac: the memory a GPU may use, and what a KV cache takes of it. Bytes before anything is allocated."""
