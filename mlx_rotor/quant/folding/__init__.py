"""Exact folds: factors moved between weights before they are fitted, chosen, and proved on the model."""
