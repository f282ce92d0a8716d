"""What a training job makes smaller: tensors in, tensors out."""
