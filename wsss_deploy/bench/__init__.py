"""Latency, throughput, memory and accuracy of model files; the command is `wsss-bench`."""
