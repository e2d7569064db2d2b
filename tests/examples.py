"""How many examples a property test is shown where each costs more than a moment."""

from hypothesis import settings


def examples(few: int) -> settings:
    """Settings with `few` examples by default, and fifty times as many in the profile `soak`."""
    long = settings.get_current_profile_name() == "soak"
    return settings(max_examples=50 * few if long else few)
