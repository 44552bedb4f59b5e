"""Weak labels in (image tags, points, scribbles, masks), `model.pt` out."""
