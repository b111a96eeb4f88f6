"""The memory that a Mac's GPU may use, and the bytes that a KV cache takes of it, before anything is allocated."""
