"""Measured quality: models and KV schemes against a reference, checkpoints against their source."""
