"""What must hold when things go wrong, when a model is shipped, and over a long run."""
