"""On-policy distillation of flow-matching image models."""
