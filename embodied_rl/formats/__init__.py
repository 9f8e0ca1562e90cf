"""Other people's trajectory formats, read and written."""
