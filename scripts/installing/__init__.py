"""Wheels built, and tried in fresh environments; scripts/build_wheels and scripts/try_install run this."""
