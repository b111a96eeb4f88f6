"""Scale folding: factors moved between weights before they are fitted, chosen, and proved exact on the model."""
