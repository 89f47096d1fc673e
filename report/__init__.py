"""What people look at: figures, TensorBoard, evaluations."""
