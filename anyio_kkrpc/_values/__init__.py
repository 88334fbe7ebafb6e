"""Values and annotations: what a method's parameters and results may be, and whether they are."""
