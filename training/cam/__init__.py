"""Class activation maps, prototypes and pseudo-labels from image tags; see docs/tags.md."""
