"""What the package brings along: a small trained model."""

from importlib import resources


def bundled_model() -> str:
    """Folder of the bundled model, larosa-tiny."""
    return str(resources.files("larosa.assets") / "larosa-tiny")
