"""Writes networks as ONNX models and as HTML pages."""
