"""What to load, and the loading itself: demand first, guesses behind it."""
