"""The cache of answers: in the process, and in a Redis server that replicas share."""

from stepalign_critic.cache.cache import CritiqueCache, Found, Source

__all__ = ["CritiqueCache", "Found", "Source"]
