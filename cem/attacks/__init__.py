"""Model inversion: decoders and pixels against features, metrics, controls, and an information bound."""
