from quantized_models import quantized  # noqa: F401  (a fixture)
