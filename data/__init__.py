"""The data of the demo; an installed package finds it as ``gradindex.data``."""
