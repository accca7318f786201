"""Estimates a phase's memory, arithmetic, communication and time on devices you do not have."""
