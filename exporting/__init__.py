"""Exports networks as ONNX models and as pages to draw on."""
