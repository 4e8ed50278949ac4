"""An artifact as a folder that answers image files without torch."""

from pathlib import Path
from typing import Any

from dynamize import artifact
from dynamize.artifact import Manifest
from dynamize.data.image_files import files_as_images
from dynamize.runtime.export import export
from dynamize.verbs.telling import answerer_names


def export_artifact(path: Path, to: Path, *, overwrite: bool = False, trust_code: bool = False) -> list[Path]:
    """Write an artifact's network, and how its images are made ready, into a new folder.

    Args:
        path: folder of the artifact.
        to: the new folder.
        overwrite: replace an earlier export there.
        trust_code: whether a source that names code may be imported.

    Returns:
        The files.

    Raises:
        DynamizeError: the folder holds something already, or the network cannot be exported.
    """
    manifest = artifact.read_manifest(path)
    network = artifact.load(path, trust_code=trust_code)
    return export(
        network,
        to,
        images=_images(manifest),
        classes=manifest.classes,
        places=answerer_names(network),
        overwrite=overwrite,
    )


def _images(manifest: Manifest) -> dict[str, Any] | None:
    """How image files are made ready, as `dynamize predict` does it; None where the artifact does not say."""
    if manifest.data is None or manifest.data.normalize is None:
        return None
    channels, height, width = manifest.input
    ready = files_as_images([], manifest.data, (channels, height, width))
    return {
        "channels": channels,
        "size": ready.geometry.size,
        "cover": ready.geometry.resize,
        "interpolation": "bilinear",
        "mean": ready.normalize.mean,
        "deviation": ready.normalize.std,
    }
