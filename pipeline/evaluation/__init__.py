"""The public benchmarks: images, answers of scorer models, published formulas."""
