"""Reads and writes model directories and other weight formats, with one conversion table per part of a model."""
