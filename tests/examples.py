"""How many examples hypothesis draws: few, or with `--hypothesis-profile=thorough` as many as each test asks for."""

from hypothesis import settings

# The same in every run, so that kernels that they need are compiled once.
settings.register_profile("quick", deadline=None, max_examples=10, derandomize=True)
settings.register_profile("thorough", deadline=None)


def examples(thorough: int) -> int:
    """`thorough`, or no more than the quick profile's."""
    return thorough if settings.get_current_profile_name() == "thorough" else min(thorough, settings().max_examples)
