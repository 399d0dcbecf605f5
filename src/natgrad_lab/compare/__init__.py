"""`natgrad compare`: who takes part, on what, by which rules, and how it is carried out."""
