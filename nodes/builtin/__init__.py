"""The nodes that come with mahlstick, by topic."""
