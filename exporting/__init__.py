"""What takes a network elsewhere: its trace, ONNX, and a page that draws."""
