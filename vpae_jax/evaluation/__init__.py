"""Generates and scores the clips of several models: the rows, their clips on disk, and their scores."""
