"""The data contract, its readers, weak-label simulation, transforms and synthetic scenes."""
