"""What a training on few labels gains from where it starts; see scripts/compare_starts."""
