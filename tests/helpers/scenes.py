"""Scenes that differ from their captions, and what a perfect reader detects in a scene."""

from dataclasses import replace

from pipeline.following.reading import DetectedObject


def true_objects(scene):
    """The scene's objects, as a perfect reader detects them."""
    return [
        DetectedObject(item.colour, item.shape, item.size, item.texture, item.x, item.y)
        for item in scene.objects
    ]


def change_object(scene, number, **attributes):
    """The scene with other attributes for one object, but the same segments: it no longer matches its
    captions."""
    objects = list(scene.objects)
    objects[number] = replace(objects[number], **attributes)
    return replace(scene, objects=tuple(objects))
