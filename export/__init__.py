"""`model.pt` to ONNX and TensorRT; every artifact proves itself against torch."""
