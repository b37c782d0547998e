"""Other libraries' interfaces on this engine: :mod:`gradindex.compat.captum`."""
