"""Functions that a dataset's settings name as annotators."""


def brightness(images, captions):
    """Return the mean of each image, and the number of its captions as a text."""
    means = [sum(image.convert("L").resize((1, 1)).getdata()) for image in images]
    return {"bright": means, "many": [f"{len(own)} captions" for own in captions]}


def too_few(images, captions):
    return {"bright": [1.0]}
