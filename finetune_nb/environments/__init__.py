"""Environments of other people, as they are: a file for each kind. Their packages are imported when one is used."""
