"""Index: rows in, the largest inner products out."""

from .flat import SearchIndex as SearchIndex
