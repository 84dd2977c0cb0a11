"""What a developer runs beside the product: the local launcher and the benchmark."""
