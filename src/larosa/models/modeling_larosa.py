"""What `auto_map` in a checkpoint's config.json names. It holds no code: the classes are those of the package larosa.

A copy is in every checkpoint, so that `trust_remote_code=True` loads it where nothing has imported larosa.
"""

from larosa.models import *  # noqa: F403
