"""What a person looks at: figures, TensorBoard, evaluations."""
